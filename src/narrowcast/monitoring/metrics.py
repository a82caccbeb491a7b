"""The ranks' snapshots as Prometheus reads them. Names and meanings: docs/monitoring.md.

Whatever has a series for each site is named site_*: there are as many as the plan has sites, times ranks. All else is
added up by kind of site.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from narrowcast.collectives.algorithms import HOPS
from narrowcast.monitoring.snapshot import Snapshot
from narrowcast.runtime.reports import ONCE, Passed, SiteReport
from narrowcast.runtime.sampling import Histogram

Labels = tuple[str, ...]
UNCODED = "none"  # in place of a codec, where values travel as they are
FALLBACKS = {
    "uncoded": "sums of a coded site that travelled in the model's own dtype, as the table of decisions has it",
    "guarded": "tokens of a site so far out of the calibrated range that they were coded in a safe form",
}


def collector_of(snapshots: Callable[[], Iterable[Snapshot]]) -> Collector:
    """A collector that asks for all ranks' `snapshots` whenever it is scraped."""
    return _Collector(snapshots)


class _Collector(Collector):
    def __init__(self, snapshots: Callable[[], Iterable[Snapshot]]) -> None:
        self._snapshots = snapshots

    def describe(self) -> Iterator[Metric]:  # a registry would otherwise scrape to learn the names
        return iter(())

    def collect(self) -> Iterator[Metric]:
        snapshots = list(self._snapshots())
        yield from _about(snapshots)
        yield from _traffic(snapshots)
        yield from _by_site(snapshots)
        yield from _sampled(snapshots)


def _about(snapshots: Sequence[Snapshot]) -> Iterator[Metric]:
    names = "version", "plan", "transport", "kernels"
    info = _gauge("info", "Versions, plan, transport and kernels of a rank.", *names)
    ranks = GaugeMetricFamily("narrowcast_ranks", "Ranks that serve together.")
    width = _gauge("planned_bytes_per_value", "Bytes that a value of the plan's sums takes.")
    tokens = _counter("tokens", "Tokens that a rank has processed.")
    taken = _gauge("snapshot_timestamp_seconds", "When the figures of a rank were taken, in Unix time.")
    for each in snapshots:
        info.add_metric(
            [str(each.rank), *(each.about[name] for name in ("version", "plan", "transport", "kernels"))], 1
        )
        tokens.add_metric([str(each.rank)], each.report.num_tokens)
        taken.add_metric([str(each.rank)], each.taken_s)
        if each.planned_bits is not None:
            width.add_metric([str(each.rank)], each.planned_bits / 8)
    if snapshots:
        ranks.add_metric([], max(each.num_ranks for each in snapshots))
    yield from (info, ranks, width, tokens, taken)


def _traffic(snapshots: Sequence[Snapshot]) -> Iterator[Metric]:
    where = "kind", "codec", "hop"
    sent = _counter("sent_bytes", "Bytes of payloads that a rank has sent.", *where)
    plain = _counter("uncompressed_bytes", "Bytes that the same values take in the model's own dtype.", *where)
    values = _counter("sent_values", "Values in those payloads.", *where)
    ratio = _gauge("compression_ratio", "Uncompressed bytes over bytes sent, since the start.")
    calls = _counter("calls", "Sums and other transfers, by the way they took.", "kind", "codec", "algorithm", "path")
    fallbacks = _counter("fallbacks", "; ".join(f"{reason}: {what}" for reason, what in FALLBACKS.items()), "reason")
    for snapshot in snapshots:
        rank, sites = str(snapshot.rank), snapshot.report.sites.values()
        passed = [(site, each) for site in sites for each in site.passed]
        hops = [hop for site, each in passed for hop in _hops(site, each)]
        for family, place in ((sent, 0), (values, 1), (plain, 2)):
            _add(family, rank, ((labels, figures[place]) for labels, figures in hops))
        total = sum(figures[0] for _, figures in hops)
        if total:
            ratio.add_metric([rank], sum(figures[2] for _, figures in hops) / total)
        _add(calls, rank, ((_call(site, each), each.times) for site, each in passed))
        uncoded = sum(each.times for site, each in passed if site.coded and each.way.form != "coded")
        for reason, number in (("uncoded", uncoded), ("guarded", snapshot.report.num_guarded)):
            fallbacks.add_metric([rank, reason], number)
    yield from (sent, plain, values, ratio, calls, fallbacks)


def _hops(site: SiteReport, passed: Passed) -> Iterator[tuple[Labels, tuple[int, int, int]]]:
    """Labels of each hop, and its bytes, values and bytes uncompressed."""
    num_values = sum(hop.num_values for hop in passed.by_hop)
    itemsize = passed.plain_bytes // num_values if num_values else 0
    names = [ONCE] if passed.way.algorithm == ONCE else list(HOPS)
    for name, hop, codec in zip(names, passed.by_hop, _codecs(site, passed), strict=False):
        yield (site.kind, codec, name), (hop.nbytes, hop.num_values, itemsize * hop.num_values)


def _codecs(site: SiteReport, passed: Passed) -> Sequence[str]:
    coded = passed.way.form == "coded"
    return site.codecs if coded else [UNCODED] * len(passed.by_hop)


def _call(site: SiteReport, passed: Passed) -> Labels:
    return site.kind, _codecs(site, passed)[0], passed.way.algorithm or "native", passed.way.path


def _by_site(snapshots: Sequence[Snapshot]) -> Iterator[Metric]:
    figures: Mapping[str, tuple[str, Callable[[SiteReport], int]]] = {
        "sent_bytes": ("Bytes of payloads that a rank has sent at a site.", lambda site: site.wire_bytes),
        "sent_values": ("Values in those payloads.", lambda site: site.num_values),
        "clipped_values": ("Coded values that were clipped.", lambda site: site.num_saturated),
        "non_finite_values": ("Coded values that were NaN or infinite.", lambda site: site.num_non_finite),
        "guarded_tokens": ("Tokens that were coded in a safe form.", lambda site: site.num_guarded),
    }
    for name, (about, figure) in figures.items():
        family = _counter(f"site_{name}", about, "site")
        for snapshot in snapshots:
            for site, report in snapshot.report.sites.items():
                if report.coded:
                    family.add_metric([str(snapshot.rank), site], figure(report))
        yield family


def _sampled(snapshots: Sequence[Snapshot]) -> Iterator[Metric]:
    sums = _counter("site_sampled_sums", "Sums that were compared with the exact one.", "site")
    lost = _counter("site_sampled_non_finite", "Of those the ones that were not finite.", "site")
    noise = _counter("site_error_squares", "Squares of the errors of tokens that were compared.", "site")
    power = _counter("site_sum_squares", "Squares of their exact sums.", "site")
    expected = _counter("site_expected_error_squares", "Squares of the errors that the plan expects of them.", "site")
    last = _gauge("site_relative_error", "Relative RMS error of the last sum that was compared.", "site")
    ratios = _histogram("relative_error_ratio", "Errors of compared sums, over the plan's.", "kind")
    residues = _histogram("residue_ratio", "RMS of what is fed back over that of the stream it goes into.", "kind")
    seconds = _histogram("sum_part_seconds", "Time that a part of a compared sum took.", "kind", "part")
    for snapshot in snapshots:
        rank = str(snapshot.rank)
        for name, site in snapshot.report.sites.items():
            if site.samples is None:
                continue
            samples, labels = site.samples, [rank, name]
            counted = (sums, samples.times), (lost, samples.num_non_finite)
            squares = (noise, samples.noise), (power, samples.power), (expected, samples.expected_noise)
            for family, number in (*counted, *squares):
                family.add_metric(labels, number)
            if samples.power:
                last.add_metric(labels, samples.last)
        for kind, found in snapshot.report.distributions.items():
            add_histogram(ratios, [rank, kind], found.ratios)
            add_histogram(residues, [rank, kind], found.residues)
            for part, histogram in found.seconds.items():
                add_histogram(seconds, [rank, kind, part], histogram)
    yield from (sums, lost, noise, power, expected, last, ratios, residues, seconds)


def _counter(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"narrowcast_{name}", about, labels=["rank", *labels])


def _gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"narrowcast_{name}", about, labels=["rank", *labels])


def _histogram(name: str, about: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"narrowcast_{name}", about, labels=["rank", *labels])


def _add(family: CounterMetricFamily, rank: str, figures: Iterable[tuple[Labels, float]]) -> None:
    """Add figures, those with the same labels added up."""
    totals: dict[Labels, float] = {}
    for labels, figure in figures:
        totals[labels] = totals.get(labels, 0) + figure
    for labels, total in totals.items():
        family.add_metric([rank, *labels], total)


def add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    """Add a histogram's counts to a family, under these labels."""
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    family.add_metric(labels, buckets, histogram.total)
