// What of a linear is the same on every instruction set (linear.h).
#include "linear.h"

namespace intserve {

namespace {

constexpr int64_t kTile = 128;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

int64_t sizes(Encoding encoding, int64_t rows, int64_t inputs, int64_t* offsets) {
    const bool integers = encoding == Encoding::int8 || encoding == Encoding::int8_tiles;
    const int64_t padded = round_up(inputs, kTile);
    const int64_t scales = encoding == Encoding::int8         ? 1
                           : encoding == Encoding::int8_tiles ? padded / kTile
                                                              : 0;
    offsets[0] = round_up(rows * padded * (integers ? 1 : 2), 64);
    offsets[1] = offsets[0] + round_up(rows * scales * 4, 64);
    offsets[2] = offsets[1] + round_up(rows * padded / 32 * 4, 64);
    return offsets[2] + round_up(rows * 4, 64);
}

}  // namespace

Encoding Linear::encoding() const {
    switch (format) {
        case Format::int8_a8:
        case Format::int4_a8: return Encoding::int8;
        case Format::int8_block: return Encoding::int8_tiles;
        case Format::int4_fp8: return Encoding::fp8;
        default: return Encoding::bf16;
    }
}

int64_t Linear::block_bytes() const {
    switch (format) {
        case Format::bf16: return round_up(inputs, 2) * 32;
        case Format::int8_block: return round_up(inputs, kTile) * 16;
        case Format::int4:
        case Format::int4_a8:
        case Format::int4_fp8: return inputs * 8;
        default: return round_up(inputs, 4) * 16;
    }
}

int64_t Encoded::bytes(Encoding encoding, int64_t rows, int64_t inputs) {
    int64_t offsets[3];
    return sizes(encoding, rows, inputs, offsets);
}

Encoded Encoded::place(Encoding encoding, int64_t rows, int64_t inputs, void* memory) {
    int64_t offsets[3];
    sizes(encoding, rows, inputs, offsets);
    uint8_t* base = static_cast<uint8_t*>(memory);
    float* scale = offsets[1] > offsets[0] ? reinterpret_cast<float*>(base + offsets[0]) : nullptr;
    return {encoding, inputs,           round_up(inputs, kTile), base,
            scale,    base + offsets[1], base + offsets[2]};
}

}  // namespace intserve
