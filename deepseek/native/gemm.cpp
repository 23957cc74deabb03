// Products of linears as tasks of a team (linear.h).
//
// A task is a column tile by some rows. Where there are few rows, weights are read once and memory is
// what limits: a tile is up to 256 outputs, which the task reads as one sequence of bytes, one block
// of 16 outputs after the other, because memory delivers long sequences fastest. Where there are
// more, arithmetic limits: a tile is up to 64 outputs, multiplied 4 blocks at a time, and the task
// goes through the inputs in chunks, so that the codes of a tile's chunk stay in the cache while all
// its rows pass over them; between chunks the sums wait in memory.
#include "isa.h"
#include "linear.h"
#include "strips.h"

namespace intserve::INTSERVE_ISA {

namespace {

constexpr int64_t kFewRowsBlocks = 16, kTileBlocks = 4;  // of a tile, at most
constexpr int64_t kMostRows = 96;       // of a task: their inputs stay in the second-level cache
constexpr int64_t kChunkBytes = 4096;   // of the codes of a block, of INT4 twice that
constexpr int64_t kTasksPerThread = 8;  // of a phase; where there would be fewer, tiles are narrower
constexpr int64_t kPrefetch = 2048;     // bytes ahead
constexpr int64_t kUnpackedInputs = 128;  // of a chunk that is unpacked: a tile of it is half a cache

struct Shape {
    int64_t width, column_tiles;  // blocks of a tile, and how many tiles there are
    int64_t rows, row_tasks;      // of a task, and how many tasks a tile is
};

bool has_few_rows(const Gemm& gemm) { return gemm.rows <= kMaxRows; }

// `width`: of tiles of few rows.
Shape shape_of(const Gemm& gemm, int64_t width) {
    Shape shape;
    const int64_t groups = (gemm.rows + kMaxRows - 1) / kMaxRows;
    shape.width = has_few_rows(gemm) || width < kTileBlocks ? width : kTileBlocks;
    shape.column_tiles = (gemm.weight->blocks() + shape.width - 1) / shape.width;
    shape.row_tasks = (gemm.rows + kMostRows - 1) / kMostRows;
    shape.rows = shape.row_tasks ? (groups + shape.row_tasks - 1) / shape.row_tasks * kMaxRows : 0;
    return shape;
}

int64_t tasks_of(const Gemm& gemm, int64_t width) {
    const Shape shape = shape_of(gemm, width);
    return shape.column_tiles * shape.row_tasks;
}

// The widest tiles of which there are enough for all threads.
int64_t width_of(const Gemm* gemms, int64_t count, int threads) {
    for (int64_t width = kFewRowsBlocks; width > 1; width /= 2) {
        int64_t tasks = 0;
        for (int64_t i = 0; i < count; ++i) tasks += tasks_of(gemms[i], width);
        if (tasks >= kTasksPerThread * threads) return width;
    }
    return 1;
}

// How much of a tile one call of an inner loop does.
struct Piece {
    void (*run)(const Strip&);
    int rows, blocks;
};

template <class Kind, int R> Piece piece_of_rows(int64_t blocks) {
    if constexpr (Kind::kMostBlocks >= 4)
        if (blocks >= 4) return {Kind::template run<R, 4>, R, 4};
    if constexpr (Kind::kMostBlocks >= 2)
        if (blocks >= 2) return {Kind::template run<R, 2>, R, 2};
    return {Kind::template run<R, 1>, R, 1};
}

template <class Kind> Piece piece_of(int64_t rows, int64_t blocks) {
    if constexpr (kMaxRows >= 6)
        if (rows >= 6) return piece_of_rows<Kind, 6>(blocks);
    if constexpr (kMaxRows >= 4) {
        if (rows >= 4) return piece_of_rows<Kind, 4>(blocks);
        if (rows == 3 && blocks == 1) return {Kind::template run<3, 1>, 3, 1};
    }
    if (rows >= 2) return piece_of_rows<Kind, 2>(blocks);
    return piece_of_rows<Kind, 1>(blocks);
}

// What the tasks need to know of a format.
struct Layout {
    Piece (*piece)(int64_t rows, int64_t blocks);
    int64_t few_rows_blocks;         // of a piece, where there are few rows
    int64_t code_bytes;              // of 16 outputs and one input
    int64_t group;                   // inputs of a scale, 0 where an output has one
    int64_t scale_bytes, zero_bytes; // of 16 outputs and one group
    // Unpacking takes longer than multiplying by a row, so that many rows share it.
    bool unpacks_once = false;
};

Layout layout_of(const Linear& w) {
    switch (w.format) {
        case Format::bf16: return {piece_of<Bf16Strip>, 1, 32, 0, 0, 0};
        case Format::int8:
        case Format::int8_asym:
            return {piece_of<Int8Strip>, 2, 16, 0, 0, 0, INTSERVE_ISA_LEVEL == 3};
        case Format::int8_a8: return {piece_of<Int8A8Strip>, 1, 16, 0, 0, 0};
        case Format::int8_block: return {piece_of<Int8BlockStrip>, 1, 16, 128, 64, 0};
        case Format::int4_a8:
            return {w.zero ? piece_of<Int4A8Strip<true>> : piece_of<Int4A8Strip<false>>, 1, 8,
                    w.group, 32, 16};
        default:
            return {w.zero ? piece_of<Int4Strip<true>> : piece_of<Int4Strip<false>>, 1, 8, w.group,
                    32, 16};
    }
}

// `inputs` INT8 codes of each of 16 outputs -> BF16 as Bf16Strip reads them.
INTSERVE_INLINE void unpack_block(const uint8_t* codes, int64_t inputs, uint8_t* to) {
#if INTSERVE_ISA_LEVEL == 3
    for (int64_t k = 0; k < inputs; k += 4, codes += 64, to += 128) {
        bf16v pairs[2];
        __builtin_prefetch(codes + kPrefetch);
        unpack_int8(loadi(codes), pairs);
        storei(to, pairs[0]);
        storei(to + 64, pairs[1]);
    }
#else
    (void)codes, (void)inputs, (void)to;
#endif
}

// The products of 16 outputs from their sums.
INTSERVE_INLINE f32v finish(const Gemm& gemm, const float* state, int64_t input_row, int64_t block) {
    const Linear& w = *gemm.weight;
    const auto output_scale = [&] {
        return load(reinterpret_cast<const float*>(w.scale) + block * kLanes);
    };
    switch (w.format) {
        case Format::int8_a8:
            return to_float(loadi(state)) * output_scale() * splat(gemm.input.scale[input_row]);
        case Format::int8: return load(state) * splat(kInt8Unit) * output_scale();
        case Format::int8_asym: {
            const float total = reinterpret_cast<const float*>(gemm.input.total)[input_row];
            const f32v zero_point =
                to_float(load_s8(reinterpret_cast<const int8_t*>(w.zero) + block * kLanes));
            const f32v sum = load(state) * splat(kInt8Unit);
            return (sum - zero_point * splat(total)) * output_scale();
        }
        case Format::int4_a8: return load(state) * splat(gemm.input.scale[input_row]);
        case Format::int4_fp8: return load(state) * splat(w.input_scale);
        default: return load(state);
    }
}

void run_task(const Gemm& gemm, int64_t width, int64_t task) {
    const Linear& w = *gemm.weight;
    const Layout layout = layout_of(w);
    const Shape shape = shape_of(gemm, width);
    // Tasks that follow each other read the same inputs.
    const int64_t first_block = task % shape.column_tiles * shape.width;
    const int64_t first_row = task / shape.column_tiles * shape.rows;
    const int64_t blocks = first_block + shape.width < w.blocks() ? shape.width
                                                                   : w.blocks() - first_block;
    const int64_t rows =
        first_row + shape.rows < gemm.rows ? shape.rows : gemm.rows - first_row;
    const bool few_rows = has_few_rows(gemm);
    const int64_t most_blocks = few_rows ? layout.few_rows_blocks : blocks;  // of a piece
    const int64_t block_bytes = w.block_bytes(), row_bytes = gemm.input.row_bytes();
    const int64_t input_bytes = row_bytes / gemm.input.padded;
    const int64_t inputs = block_bytes / layout.code_bytes;  // with padding
    const bool unpacks = layout.unpacks_once && !few_rows;
    const int64_t chunk = few_rows  ? inputs
                          : unpacks ? kUnpackedInputs
                                    : kChunkBytes * (layout.code_bytes == 8 ? 2 : 1) / layout.code_bytes;
    const int64_t groups = layout.group ? inputs / layout.group : 0;

    constexpr int64_t kStates = kMostRows * kTileBlocks > kMaxRows * kFewRowsBlocks
                                    ? kMostRows * kTileBlocks : kMaxRows * kFewRowsBlocks;
    alignas(64) float state[kStates * kLanes];  // [rows][blocks][16]
    alignas(64) uint8_t unpacked[kTileBlocks][kUnpackedInputs * 32];
    const auto find_piece = unpacks ? piece_of<Bf16Strip> : layout.piece;
    const int64_t state_stride = shape.width * kLanes;
    for (int64_t r = 0; r < rows; ++r) {
        f32v initial = zero();
        if (w.format == Format::int8_a8) {
            const int32_t* totals = reinterpret_cast<const int32_t*>(gemm.input.total);
            initial = as_float(splati(-128 * totals[first_row + r]));
        }
        for (int64_t i = 0; i < state_stride; i += kLanes)
            store(state + r * state_stride + i, initial);
    }

    for (int64_t k = 0; k < inputs; k += chunk) {
        Strip strip;
        strip.inputs = k + chunk < inputs ? chunk : inputs - k;
        strip.group = layout.group;
        strip.codes_stride = unpacks ? static_cast<int64_t>(sizeof(unpacked[0])) : block_bytes;
        strip.scale_stride = groups * layout.scale_bytes;
        strip.zero_stride = groups * layout.zero_bytes;
        strip.state_stride = state_stride;
        strip.prefetch = unpacks ? 0 : kPrefetch;
        const int64_t group = layout.group ? k / layout.group : 0;
        const uint8_t* const codes = w.codes + first_block * block_bytes + k * layout.code_bytes;
        for (int64_t b = 0; unpacks && b < blocks; ++b)
            unpack_block(codes + b * block_bytes, strip.inputs, unpacked[b]);
        for (int64_t b = 0; b < blocks;) {
            const int64_t block = first_block + b;
            strip.codes = unpacks ? unpacked[b] : codes + b * block_bytes;
            if (layout.group)
                strip.scale = w.scale + block * strip.scale_stride + group * layout.scale_bytes;
            if (layout.group && w.zero)
                strip.zero = w.zero + block * strip.zero_stride + group * layout.zero_bytes;
            Piece piece{};
            for (int64_t r = 0; r < rows; r += piece.rows) {
                piece = find_piece(rows - r, blocks - b < most_blocks ? blocks - b : most_blocks);
                for (int i = 0; i < piece.rows; ++i) {
                    const int64_t row = first_row + r + i;
                    strip.x[i] = gemm.input.data + row * row_bytes + k * input_bytes;
                    strip.x_sums[i] = gemm.input.sums + (row * gemm.input.padded + k) / 32 * 4;
                    if (gemm.input.encoding == Encoding::int8_tiles)
                        strip.x_scale[i] =
                            gemm.input.scale + (row * gemm.input.padded + k) / 128;
                }
                strip.state = state + r * state_stride + b * kLanes;
                piece.run(strip);
            }
            b += piece.blocks;
        }
    }

    for (int64_t r = 0; r < rows; ++r) {
        float* out = gemm.out + (first_row + r) * gemm.out_stride;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t block = first_block + b, column = block * kLanes;
            const int count =
                static_cast<int>(w.outputs - column < kLanes ? w.outputs - column : kLanes);
            const float* sums = state + r * state_stride + b * kLanes;
            store_first(out + column, finish(gemm, sums, first_row + r, block), count);
        }
    }
}

void run_list(int threads, GemmList& list) {
    count_tasks(list, threads);
    run_team(threads, 1, [&](Worker& worker) { run_gemms(worker, list); });
}

}  // namespace

void run_gemm(Worker& worker, const Gemm& gemm) {
    const int64_t width = width_of(&gemm, 1, worker.threads);
    worker.for_each(tasks_of(gemm, width), [&](int64_t task) { run_task(gemm, width, task); });
}

void count_tasks(GemmList& list, int threads) {
    list.width = width_of(list.gemms, list.count, threads);
    list.tasks = 0;
    for (int64_t i = 0; i < list.count; ++i) {
        list.first_task[i] = list.tasks;
        list.tasks += tasks_of(list.gemms[i], list.width);
    }
}

void run_gemms(Worker& worker, const GemmList& list) {
    worker.for_each(list.tasks, [&](int64_t task) {
        int64_t low = 0, high = list.count;  // the last product that begins at or before the task
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (list.first_task[middle] <= task ? low : high) = middle;
        }
        run_task(list.gemms[low], list.width, task - list.first_task[low]);
    });
}

extern const LinearKernels linear_kernels = {run_gemm, count_tasks, run_gemms, run_list};

}  // namespace intserve::INTSERVE_ISA
