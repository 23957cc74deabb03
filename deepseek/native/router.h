// DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2): sigmoid scores; groups ranked by the sum of
// their two best biased scores; the best experts of the best groups. The bias changes which experts
// are chosen, not their weights. Ties go to the lowest index.
#pragma once

#include <cstdint>
#include <vector>

namespace intserve {

struct RouterShape {
    int64_t experts, groups, chosen_groups, chosen;
    bool normalizes;     // weights are divided by their sum
    float routed_scale;  // and multiplied by this
};

// Scores [experts] of one token, and the bias -> the chosen experts, best first, and their weights.
// `scratch` is room for `2 experts + groups` values.
void choose_experts(const RouterShape& shape, const float* scores, const float* bias,
                    float* scratch, int32_t* experts, float* weights);

// Which rows each expert computes. A token's choice c is place t * chosen + c. The rows of all routed
// experts lie expert by expert, in order of place.
struct Routing {
    // The rows [first, first + rows) of one expert.
    struct Run {
        int64_t expert, first, rows;
    };

    std::vector<int32_t> row;            // of each place
    std::vector<int32_t> token, expert;  // of each row
    std::vector<Run> runs;               // of the experts that have rows

    // `experts` has one for each place.
    void build(const int32_t* experts, int64_t places, int64_t chosen, int64_t num_experts);

private:
    std::vector<int64_t> next_;  // row of each expert
};

}  // namespace intserve
