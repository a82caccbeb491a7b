"""The compiled module (csrc/bindings/native.cpp).

Tensors are passed as addresses; dtypes as 0 (bf16), 1 (fp16), 2 (fp32).
"""

# Kernels (csrc/bindings/kernels.cpp). Strides are in values, or in bytes for payloads.

class Format: ...

def cast(dtype: int) -> Format: ...
def feature(
    num_bits: int,
    num_features: int,
    scale: int,
    reciprocal: int,
    outliers: int,
    num_outliers: int,
    holes: int,
    fillers: int,
    num_holes: int,
    tame: bool,
    guard_bits: int,
    guard_group_size: int,
) -> Format: ...
def group(num_bits: int, group_size: int, symmetric: bool, spikes: bool) -> Format: ...
def minifloat(
    num_bits: int, mantissa_bits: int, smallest_exponent: int, largest_code: int, scale_format: int, block_size: int
) -> Format: ...
def allocated(
    num_features: int,
    num_blocks: int,
    num_escapes: int,
    row_nbytes: int,
    same_order: bool,
    scale: int,
    reciprocal: int,
    order: int,
    slots: int,
    widths: int,
    token_scale: int,
    token_reciprocal: int,
    scale_edges: int,
    levels: int,
    by_subset: int,
    edges: int,
    bisected: int,
    nearest: int,
    up_to: int,
) -> Format: ...
def encode(
    format: Format,
    x: int,
    dtype: int,
    num_tokens: int,
    num_features: int,
    stride: int,
    source: int,
    out: int,
    out_stride: int,
    stats: int,
) -> None: ...
def encode_with_residue(
    format: Format,
    x: int,
    dtype: int,
    num_tokens: int,
    num_features: int,
    stride: int,
    residue: int,
    residue_stride: int,
    source: int,
    out: int,
    out_stride: int,
    stats: int,
) -> None: ...
def decode_sum(
    format: Format,
    payloads: int,
    num_ranks: int,
    rank_stride: int,
    token_stride: int,
    first_source: int,
    out: int,
    dtype: int,
    num_tokens: int,
    num_features: int,
    stride: int,
) -> None: ...
def recode(
    partial: Format,
    payloads: int,
    num_ranks: int,
    rank_stride: int,
    token_stride: int,
    reduced: Format,
    num_tokens: int,
    num_features: int,
    out: int,
    out_stride: int,
    stats: int,
) -> None: ...
def limit_threads(most: int) -> None: ...
def paths() -> list[str]: ...
def path() -> str: ...
def use_path(name: str) -> None: ...

# Matrices in few bits: csrc/bindings/weights.cpp, products in schedule.cpp. Kinds are those of `weights.packed`;
# strides are in values.

class PackedMatrix: ...

def packed(
    kind: int, blocks: int, row_nbytes: int, num_rows: int, group_size: int, bf16_scales: bool, scale: float
) -> PackedMatrix: ...
def multiply_packed(
    matrix: PackedMatrix,
    first_row: int,
    num_rows: int,
    first_column: int,
    num_columns: int,
    x: int,
    dtype: int,
    num_tokens: int,
    x_stride: int,
    bias: int,
    y: int,
    y_stride: int,
    num_threads: int,
) -> None: ...
def multiply_bf16(
    weight: int,
    stride: int,
    num_rows: int,
    num_columns: int,
    x: int,
    num_tokens: int,
    bias: int,
    y: int,
    y_stride: int,
    num_threads: int,
) -> None: ...
def dequantize_packed(
    matrix: PackedMatrix,
    first_row: int,
    num_rows: int,
    first_column: int,
    num_columns: int,
    out: int,
    num_threads: int,
) -> None: ...
def look_up_packed(matrix: PackedMatrix, rows: int, num_rows: int, num_columns: int, out: int) -> None: ...
def use_huge_pages(address: int, nbytes: int) -> None: ...
def read_memory(address: int, nbytes: int, num_threads: int) -> int: ...

# Decoding steps: csrc/bindings/schedule.cpp. A place is an address and the strides between sequences, heads and tokens.

def attend(
    dtype: int,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    num_queries: int,
    context: int,
    head_dim: int,
    scale: float,
    softcap: float,
    causal: bool,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    mask_kind: int,
    mask_dtype: int,
    mask: tuple[int, int, int, int],
    mask_key: int,
    new_k: tuple[int, int, int, int],
    new_v: tuple[int, int, int, int],
    cos: int,
    sin: int,
    turn_sequence: int,
    turn_token: int,
    turn_size: int,
    places: int,
    num_keys: int,
    num_places: int,
    spans: int,
) -> None: ...
def rms_norm(
    dtype: int,
    x: int,
    stride: int,
    weight: int,
    out: int,
    num_rows: int,
    num_values: int,
    epsilon: float,
    from_one: bool,
) -> None: ...

# Values one by one. Rows are an address, a dtype, the stride between rows, their number, and that of their values.

def combine(
    how: int,
    a: tuple[int, int, int, int, int],
    b: tuple[int, int, int, int, int],
    out: tuple[int, int, int, int, int],
) -> None: ...
def look_up(table: int, x: tuple[int, int, int, int, int], out: tuple[int, int, int, int, int]) -> None: ...

# What ran once, run again in one call, with other tensors in place of those that move: csrc/bindings/schedule.cpp.
# It has a method for each of the operators above, from `multiply_packed` on, of the same arguments.

class Schedule:
    def __init__(self, moving: list[tuple[int, int]], kept: object) -> None: ...
    def sum(self, sum: Sum, x: int, y: int, residue: int, stats: int) -> None: ...
    def run(
        self,
        moving: list[int],
        keys: tuple[int, int, int, int],
        values: tuple[int, int, int, int],
        context: int,
        mask: tuple[int, int, int, int],
        mask_key: int,
        tags: list[int],
        timeout_s: float,
    ) -> tuple[str, int, str, int, int] | None: ...

# The TCP mesh: csrc/bindings/mesh.cpp.

class Exchange:
    def wait(self, timeout_s: float) -> tuple[str, int, str, int, int] | None: ...

class Mesh:
    def __init__(self, fds: list[int], spin: bool) -> None: ...
    def exchange(
        self, sends: list[tuple[int, int, int]], recvs: list[tuple[int, int, int]], tag: int, buffers: object
    ) -> Exchange: ...

def hang_up() -> None: ...

# Sums in one call: csrc/bindings/sum.cpp. A place is an address (0), or bytes from the x (1), y (2) or residue (3) of
# the call.

Place = tuple[int, int]

class Sum:
    def __init__(self, mesh: Mesh, kept: object) -> None: ...
    def encode(
        self,
        format: Format,
        x: Place,
        dtype: int,
        num_tokens: int,
        num_features: int,
        stride: int,
        source: int,
        out: Place,
        out_stride: int,
    ) -> None: ...
    def encode_with_residue(
        self,
        format: Format,
        x: Place,
        dtype: int,
        num_tokens: int,
        num_features: int,
        stride: int,
        residue: Place,
        residue_stride: int,
        source: int,
        out: Place,
        out_stride: int,
    ) -> None: ...
    def decode_sum(
        self,
        format: Format,
        payloads: Place,
        num_ranks: int,
        rank_stride: int,
        token_stride: int,
        first_source: int,
        out: Place,
        dtype: int,
        num_tokens: int,
        num_features: int,
        stride: int,
    ) -> None: ...
    def recode(
        self,
        partial: Format,
        payloads: Place,
        num_ranks: int,
        rank_stride: int,
        token_stride: int,
        reduced: Format,
        num_tokens: int,
        num_features: int,
        out: Place,
        out_stride: int,
    ) -> None: ...
    def exchange(self, sends: list[tuple[int, int, int]], recvs: list[tuple[int, int, int]]) -> None: ...
    def run(
        self, x: int, y: int, residue: int, stats: int, tag: int, timeout_s: float
    ) -> tuple[str, int, str, int, int] | None: ...
