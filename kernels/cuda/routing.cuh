// Routing rules on the device: what kernels/src/routing.rs defines, in the
// same bits. One block of ROUTING_THREADS threads answers for one token.
//
// Sums that the definition takes in index order are taken so by every thread
// for itself: a chain of additions is as long for one thread as for all, and
// nobody has to wait for the answer. Ranks are counted: the rank of a value is
// the number of values in front of it, so an order of threads has no say.
//
// Loops over a thread's own experts are not unrolled: they have one to four
// rounds, and the code would be four times as long.
#pragma once
#include "order.cuh"

#define ROUTING_THREADS 128
#define MAX_EXPERTS 512
#define MAX_CHOICES 16

// Kinds of rules; kernels/src/cuda/router.rs has the same numbers.
#define RULE_SOFTMAX 0
#define RULE_SIGMOID 1
#define RULE_SOFTMAX_OF_TOP_K 2
#define RULE_SPARSE_MIXER 3

// A record of the table of routers: one number per 64-bit word. The order is
// that of kernels/src/cuda/router.rs.
#define ROUTER_WORDS 16
#define WORD_NORM_WEIGHT 0    // address, f32 [hidden]
#define WORD_NORM_BIAS 1      // address or 0, f32 [hidden]
#define WORD_WEIGHT 2         // address, [experts, hidden]
#define WORD_BIAS 3           // address or 0, f32 [experts]
#define WORD_SELECTION_BIAS 4 // address or 0, f32 [experts]
#define WORD_FORMAT 5         // `Format::ggml_type`
#define WORD_LAYER_NORM 6     // 0: RMS, 1: mean and variance
#define WORD_EPSILON 7        // f32 bits
#define WORD_EXPERTS 8
#define WORD_TOP_K 9
#define WORD_RULE 10
#define WORD_GROUPS 11
#define WORD_GROUPS_USED 12
#define WORD_RENORMALISE 13
#define WORD_SCALE 14         // f32 bits
#define WORD_JITTER 15        // f32 bits

struct Rule {
    int kind;
    int experts;
    int top_k;
    int groups;
    int groups_used;
    int renormalise;
    float scale;
    float jitter;
    const float *selection_bias; // [experts] or null
};

DEVICE Rule read_rule(const unsigned long long *record) {
    Rule rule;
    rule.kind = (int)record[WORD_RULE];
    rule.experts = (int)record[WORD_EXPERTS];
    rule.top_k = (int)record[WORD_TOP_K];
    rule.groups = (int)record[WORD_GROUPS];
    rule.groups_used = (int)record[WORD_GROUPS_USED];
    rule.renormalise = (int)record[WORD_RENORMALISE];
    rule.scale = float_of((unsigned)record[WORD_SCALE]);
    rule.jitter = float_of((unsigned)record[WORD_JITTER]);
    rule.selection_bias = (const float *)record[WORD_SELECTION_BIAS];
    return rule;
}

// Shared memory of a block, one for everything below.
struct Workspace {
    float *values;   // [MAX_EXPERTS]
    float *ranking;  // [MAX_EXPERTS]
    u32 *keys;       // [MAX_EXPERTS]
    int *candidates; // [MAX_EXPERTS]
    int *is_open;    // [MAX_EXPERTS]
    u32 *largest;    // [ROUTING_THREADS]
    float *chosen;   // [MAX_CHOICES]
    u32 *bound;      // [1]
    int *reached;    // [1]
};

#define ROUTING_WORKSPACE(name)                                                                   \
    SHARED(float, name##_values, MAX_EXPERTS);                                                    \
    SHARED(float, name##_ranking, MAX_EXPERTS);                                                   \
    SHARED(u32, name##_keys, MAX_EXPERTS);                                                        \
    SHARED(int, name##_candidates, MAX_EXPERTS);                                                  \
    SHARED(int, name##_is_open, MAX_EXPERTS);                                                     \
    SHARED(u32, name##_largest, ROUTING_THREADS);                                                 \
    SHARED(float, name##_chosen, MAX_CHOICES);                                                    \
    SHARED(u32, name##_bound, 1);                                                                 \
    SHARED(int, name##_reached, 1);                                                               \
    const Workspace name = {name##_values,  name##_ranking, name##_keys,                          \
                            name##_candidates, name##_is_open, name##_largest,                    \
                            name##_chosen,  name##_bound,   name##_reached}

// `values[i]` added one after the other onto `start`.
DEVICE float sum_in_order(float start, const float *values, int count) {
    float total = start;
    for (int i = 0; i < count; i++) {
        total = total + values[i];
    }
    return total;
}

#define INFINITE float_of(0x7f800000u)

DEVICE bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// Whether a ranking prefers `value` to `other`, the other being first in line.
DEVICE bool beats(float value, float other) {
    return value > other || (other != other && value == value);
}

// Calls `found(rank, i)` for the `wanted` first of `keys[0..count]` of the
// workspace: falling, equal ones in index order. All threads of the block call
// it, a barrier behind the keys; what `found` wrote is read behind another.
//
// Comparing all with all is quadratic, so first each thread's largest key is
// ranked: the `wanted`-th of those is a bound that at least `wanted` keys
// reach. What reaches it is compared with what reaches it.
template <class Found>
DEVICE void rank_keys(const Workspace &work, int count, int wanted, Found found) {
    const int thread = (int)threadIdx.x;
    u32 mine = 0u;
#pragma unroll 1
    for (int i = thread; i < count; i += ROUTING_THREADS) {
        mine = work.keys[i] > mine ? work.keys[i] : mine;
    }
    work.largest[thread] = mine;
    if (thread == 0) {
        work.bound[0] = 0u;
        work.reached[0] = 0;
    }
    __syncthreads();
    if (count > ROUTING_THREADS && wanted <= ROUTING_THREADS) {
        int rank = 0;
        for (int j = 0; j < ROUTING_THREADS; j++) {
            const u32 other = work.largest[j];
            rank += j < thread ? other >= mine : other > mine;
        }
        if (rank == wanted - 1) {
            work.bound[0] = mine;
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int i = thread; i < count; i += ROUTING_THREADS) {
        if (work.keys[i] >= work.bound[0]) {
            work.candidates[atomicAdd(work.reached, 1)] = i;
        }
    }
    __syncthreads();
    const int left = work.reached[0];
#pragma unroll 1
    for (int c = thread; c < left; c += ROUTING_THREADS) {
        const int i = work.candidates[c];
        const u32 key = work.keys[i];
        int rank = 0;
        for (int other = 0; other < left; other++) {
            const int j = work.candidates[other];
            rank += work.keys[j] > key || (work.keys[j] == key && j < i);
        }
        if (rank < wanted) {
            found(rank, i);
        }
    }
}

// Closes all but the best groups of the ranking: sets them to -infinity.
// Groups are ranked by their best expert (softmax) or by the sum of their best
// two (sigmoid). Barriers stand before and after; the keys are lost.
DEVICE void close_groups(const Rule &rule, const Workspace &work) {
    const int size = rule.experts / rule.groups;
#pragma unroll 1
    for (int group = (int)threadIdx.x; group < rule.groups; group += ROUTING_THREADS) {
        const float *members = work.ranking + group * size;
        float first = members[0];
        float second = float_of(0x7fc00000u);
        for (int i = 1; i < size; i++) {
            const float value = members[i];
            if (beats(value, first)) {
                second = first;
                first = value;
            } else if (i == 1 || beats(value, second)) {
                second = value;
            }
        }
        const bool pair = rule.kind == RULE_SIGMOID && size > 1;
        work.keys[group] = order_key(pair ? first + second : first);
        work.is_open[group] = 0;
    }
    __syncthreads();
    rank_keys(work, rule.groups, rule.groups_used,
              [&](int, int group) { work.is_open[group] = 1; });
    __syncthreads();
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < rule.experts; i += ROUTING_THREADS) {
        if (!work.is_open[i / size]) {
            work.ranking[i] = -INFINITE;
        }
    }
    __syncthreads();
}

// In place: exp(value - largest) / sum. Barriers stand before and after.
DEVICE void softmax_of(float *values, int count) {
    float largest = -INFINITE;
    for (int i = lane_id(); i < count; i += 32) {
        largest = values[i] > largest ? values[i] : largest;
    }
#pragma unroll
    for (int s = 16; s > 0; s /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, largest, s);
        largest = other > largest ? other : largest;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < count; i += ROUTING_THREADS) {
        values[i] = contract_exp(values[i] - largest);
    }
    __syncthreads();
    const float total = sum_in_order(0.0f, values, count);
    __syncthreads();
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < count; i += ROUTING_THREADS) {
        values[i] = values[i] / total;
    }
    __syncthreads();
}

// Softmax or sigmoid scores, groups, bias, renormalising.
template <class Logits>
DEVICE void choose_by_score(const Rule &rule, const Workspace &work, Logits logits, int *ids,
                            float *weights) {
    const int thread = (int)threadIdx.x;
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        const float logit = logits[i];
        work.values[i] = rule.kind == RULE_SIGMOID ? contract_sigmoid(logit) : logit;
    }
    __syncthreads();
    if (rule.kind == RULE_SOFTMAX) {
        softmax_of(work.values, rule.experts);
    }
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        const float score = work.values[i];
        work.ranking[i] = rule.selection_bias ? score + rule.selection_bias[i] : score;
    }
    __syncthreads();
    if (rule.groups_used < rule.groups) {
        close_groups(rule, work);
    }
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        work.keys[i] = order_key(work.ranking[i]);
    }
    __syncthreads();
    rank_keys(work, rule.experts, rule.top_k, [&](int rank, int expert) {
        work.chosen[rank] = work.values[expert];
        ids[rank] = expert;
    });
    __syncthreads();
    if (thread < rule.top_k) {
        float weight = work.chosen[thread];
        if (rule.renormalise) {
            weight = weight / (sum_in_order(-0.0f, work.chosen, rule.top_k) + 1e-20f);
        }
        weights[thread] = weight * rule.scale;
    }
}

// The best logits, softmax over those.
template <class Logits>
DEVICE void choose_then_softmax(const Rule &rule, const Workspace &work, Logits logits, int *ids,
                                float *weights) {
    const int thread = (int)threadIdx.x;
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        work.values[i] = logits[i];
        work.keys[i] = order_key(work.values[i]);
    }
    __syncthreads();
    rank_keys(work, rule.experts, rule.top_k, [&](int rank, int expert) {
        work.chosen[rank] = work.values[expert];
        ids[rank] = expert;
    });
    __syncthreads();
    softmax_of(work.chosen, rule.top_k);
    if (thread < rule.top_k) {
        weights[thread] = work.chosen[thread];
    }
}

// One choice after the other, each normalised over the experts near it.
template <class Logits>
DEVICE void choose_one_by_one(const Rule &rule, const Workspace &work, Logits logits, int *ids,
                              float *weights) {
    const int thread = (int)threadIdx.x;
    float *open = work.values;
    float *terms = work.ranking;
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        open[i] = logits[i];
    }
    __syncthreads();
    for (int choice = 0; choice < rule.top_k; choice++) {
#pragma unroll 1
        for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
            work.keys[i] = order_key(open[i]);
        }
        __syncthreads();
        rank_keys(work, rule.experts, 1, [&](int, int first) {
            ids[choice] = first;
            work.is_open[0] = first;
        });
        __syncthreads();
        const int expert = work.is_open[0];
        const float best = open[expert];
#pragma unroll 1
        for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
            const float logit = logits[i];
            const float magnitude = logit < 0.0f ? -logit : logit;
            // The larger one, and the other of a NaN.
            const float larger = magnitude > best || best != best ? magnitude : best;
            const bool near = (best - logit) / larger <= 2.0f * rule.jitter;
            // -0 added to a sum leaves it as it is.
            terms[i] = near ? contract_exp(open[i] - best) : -0.0f;
        }
        __syncthreads();
        if (thread == 0) {
            weights[choice] = 1.0f / sum_in_order(-0.0f, terms, rule.experts);
            open[expert] = -INFINITE;
        }
        __syncthreads();
    }
}

// `ids[top_k]` and `weights[top_k]` of one token in router order, from
// `logits[experts]` (a pointer, volatile where other blocks wrote them). All
// threads of the block.
template <class Logits>
DEVICE void choose(const Rule &rule, const Workspace &work, Logits logits, int *ids,
                   float *weights) {
    if (rule.kind == RULE_SOFTMAX_OF_TOP_K) {
        choose_then_softmax(rule, work, logits, ids, weights);
    } else if (rule.kind == RULE_SPARSE_MIXER) {
        choose_one_by_one(rule, work, logits, ids, weights);
    } else {
        choose_by_score(rule, work, logits, ids, weights);
    }
}

// The `wanted` experts that the rule would prefer, and the finite scores that
// put them in this order; -1 and -infinity behind the last. All threads of the
// block.
template <class Logits>
DEVICE void foresee(const Rule &rule, const Workspace &work, Logits logits, int wanted, int *ids,
                    float *scores) {
    const int thread = (int)threadIdx.x;
    const float *bias = rule.selection_bias;
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        const float logit = logits[i];
        work.ranking[i] = bias ? contract_sigmoid(logit) + bias[i] : logit;
    }
    __syncthreads();
    if (rule.groups_used < rule.groups) {
        close_groups(rule, work);
    }
    float lowest = 0.0f;
    for (int i = lane_id(); i < rule.experts; i += 32) {
        const float value = work.ranking[i];
        lowest = is_finite(value) && value < lowest ? value : lowest;
    }
#pragma unroll
    for (int s = 16; s > 0; s /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, lowest, s);
        lowest = other < lowest ? other : lowest;
    }
    lowest = (lowest < -1e30f ? -1e30f : lowest) - 1.0f;
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < rule.experts; i += ROUTING_THREADS) {
        const float value = work.ranking[i];
        work.ranking[i] = is_finite(value) ? value : lowest;
        work.keys[i] = order_key(work.ranking[i]);
    }
    __syncthreads();
    const int most = wanted < rule.experts ? wanted : rule.experts;
    rank_keys(work, rule.experts, most, [&](int rank, int expert) {
        ids[rank] = expert;
        scores[rank] = work.ranking[expert];
    });
#pragma unroll 1
    for (int rank = most + thread; rank < wanted; rank += ROUTING_THREADS) {
        ids[rank] = -1;
        scores[rank] = -INFINITE;
    }
}
