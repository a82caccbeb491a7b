// What a decoding step does beside its products, by the selected path, shared out among threads.
#pragma once

#include "decode.h"

namespace narrowcast {

void attend(const Attention&);
void norm(const RmsNorm&);
void combine(const Combination&);
void look_up(const Function&);

}  // namespace narrowcast
