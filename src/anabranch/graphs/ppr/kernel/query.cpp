// Personalised PageRank queries: exact pushes, then a look at fingerprints. What is computed is said
// in anabranch.graphs.ppr.query, which does it in NumPy; here sources go one after the other, or as a
// group where they reach the same rows.
//
// A sum runs over a source's nodes in rising order either way, and products are rounded before they
// are added (-ffp-contract=off), so that an answer does not depend on the others of its group.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <vector>

namespace {

constexpr int64_t GROUP = 16;  // floats of the widest register
constexpr int64_t CELLS = int64_t{1} << 24;  // most floats that a group works on together
constexpr int64_t GAIN = 8;  // so many times faster is a sum over a group than over single sources
constexpr int64_t AHEAD = 8;  // rows that are fetched before they are needed

// One number of each source of a group.
typedef float Lanes __attribute__((vector_size(GROUP * sizeof(float))));

// Nodes in rising order unless said otherwise.
struct Masses {
    std::vector<int32_t> nodes;
    std::vector<float> mass;

    void clear() { nodes.clear(); mass.clear(); }
    void add(int32_t node, float value) { nodes.push_back(node); mass.push_back(value); }
    void resize(size_t size) { nodes.resize(size); mass.resize(size); }
    size_t size() const { return nodes.size(); }
};

template <class Value>
struct Matrix {
    const int64_t* ends;
    const int32_t* nodes;
    const Value* values;

    int64_t length(int32_t row) const { return ends[row + 1] - ends[row]; }
    // Asks for a row's first cache lines; the processor goes on by itself. May lie behind the end.
    void fetch(int32_t row) const {
        __builtin_prefetch(nodes + ends[row]);
        __builtin_prefetch(nodes + ends[row] + 16);
        __builtin_prefetch(values + ends[row]);
    }
};

// A set of nodes that is listed in rising order: a bit for each, and one for each word of bits.
class NodeSet {
  public:
    explicit NodeSet(int64_t n) : words_((n + 63) / 64), filled_((n + 4095) / 4096) {}

    void insert(int32_t node) {
        words_[node >> 6] |= uint64_t{1} << (node & 63);
        filled_[node >> 12] |= uint64_t{1} << (node >> 6 & 63);
    }

    // Writes all nodes to `found`, and leaves the set empty.
    void drain(std::vector<int32_t>& found) {
        size_t count = 0;
        for (size_t part = 0; part < filled_.size(); ++part) {
            for (; filled_[part]; filled_[part] &= filled_[part] - 1) {
                const size_t word = part * 64 + __builtin_ctzll(filled_[part]);
                uint64_t left = words_[word];
                words_[word] = 0;
                if (found.size() < count + 64) found.resize(2 * count + 64);
                int32_t* next = found.data() + count;
                count += __builtin_popcountll(left);
                // Four at a time, needed or not: what is written too much is written over.
                do
                    for (int i = 0; i < 4; ++i, left &= left - 1)
                        *next++ = static_cast<int32_t>(word * 64 + __builtin_ctzll(left | LAST));
                while (left);
            }
        }
        found.resize(count);
    }

  private:
    static constexpr uint64_t LAST = uint64_t{1} << 63;  // a count of zeros needs a bit
    std::vector<uint64_t> words_, filled_;
};

// Dense sums [n, width], all zero between uses; rows of GROUP begin at a cache line.
struct Sums {
    Sums(int64_t n, int64_t width) : reached(n) {
        const size_t bytes = (n * width * sizeof(float) / 64 + 1) * 64;
        values.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (!values) throw std::bad_alloc();
        std::memset(values.get(), 0, bytes);
    }
    struct Free { void operator()(float* memory) const { std::free(memory); } };
    std::unique_ptr<float[], Free> values;
    NodeSet reached;
};

struct Query {
    int64_t n;
    Matrix<float> onward;  // [n, n], times 1 - restart
    const int64_t* visit_ends;
    const int32_t* visit_nodes;
    const void* visit_counts;
    int64_t count_bytes;  // 2, 4, or 0 without an index
    const float* scale;  // [n], what a visit is worth
    const float* missing;  // [n], share of a node's mass that is not looked up
    double restart;
    int64_t rounds;
    double threshold;  // negative: none
    int64_t work;
    int64_t top_k;  // 0: everything
};

struct Source {
    Masses flow;
    Masses stopped;  // in the order of the rounds
    double dropped = 0;

    void start(int32_t node) {
        flow.clear();
        stopped.clear();
        flow.add(node, 1.0f);
        dropped = 0;
    }
};

template <class Value>
void fetch_first(const Masses& flow, const Matrix<Value>& matrix) {
    const int64_t count = std::min<int64_t>(AHEAD, flow.size());
    for (int64_t i = 0; i < count; ++i) matrix.fetch(flow.nodes[i]);
}

template <class Value>
void spread_alone(Masses& flow, const Matrix<Value>& matrix, const Masses* plus, Sums& sums) {
    if (flow.size() == 1 && !plus) {  // nothing is to be summed
        const int32_t row = flow.nodes[0];
        const float mass = flow.mass[0];
        flow.clear();
        for (int64_t entry = matrix.ends[row]; entry < matrix.ends[row + 1]; ++entry) {
            const float given = mass * static_cast<float>(matrix.values[entry]);
            if (given != 0) flow.add(matrix.nodes[entry], given);
        }
        return;
    }
    float* total = sums.values.get();
    const int64_t count = flow.size();
    for (int64_t i = 0; i < count; ++i) {
        if (i + AHEAD < count) matrix.fetch(flow.nodes[i + AHEAD]);
        const int32_t row = flow.nodes[i];
        const float mass = flow.mass[i];
        for (int64_t entry = matrix.ends[row]; entry < matrix.ends[row + 1]; ++entry) {
            const int32_t node = matrix.nodes[entry];
            total[node] += mass * static_cast<float>(matrix.values[entry]);
            sums.reached.insert(node);
        }
    }
    for (size_t i = 0; plus && i < plus->size(); ++i) {
        total[plus->nodes[i]] += plus->mass[i];
        sums.reached.insert(plus->nodes[i]);
    }
    sums.reached.drain(flow.nodes);
    flow.mass.resize(flow.size());
    size_t kept = 0;
    for (const int32_t node : flow.nodes) {
        flow.nodes[kept] = node;
        flow.mass[kept] = total[node];
        kept += total[node] != 0;  // it may be too small for a float
        total[node] = 0;
    }
    flow.resize(kept);
}

template <class Value>
void spread_together(std::vector<Source>& group, const std::vector<int32_t>& rows,
                     const Matrix<Value>& matrix, bool plus, Sums& sums) {
    Sums masses(rows.size(), GROUP);
    Lanes* given = reinterpret_cast<Lanes*>(masses.values.get());
    for (size_t s = 0; s < group.size(); ++s) {
        const Masses& flow = group[s].flow;
        size_t at = 0;
        for (size_t i = 0; i < flow.size(); ++i) {
            while (rows[at] != flow.nodes[i]) ++at;
            given[at][s] = flow.mass[i];
        }
    }
    Lanes* total = reinterpret_cast<Lanes*>(sums.values.get());
    for (size_t at = 0; at < rows.size(); ++at) {
        const Lanes mass = given[at];
        for (int64_t entry = matrix.ends[rows[at]]; entry < matrix.ends[rows[at] + 1]; ++entry) {
            const int32_t node = matrix.nodes[entry];
            total[node] += mass * static_cast<float>(matrix.values[entry]);
            sums.reached.insert(node);
        }
    }
    for (size_t s = 0; s < group.size(); ++s) {
        const Masses& stopped = group[s].stopped;
        for (size_t i = 0; plus && i < stopped.size(); ++i) {
            total[stopped.nodes[i]][s] += stopped.mass[i];
            sums.reached.insert(stopped.nodes[i]);
        }
        group[s].flow.clear();
    }
    std::vector<int32_t> nodes;
    sums.reached.drain(nodes);
    for (int32_t node : nodes) {
        for (size_t s = 0; s < group.size(); ++s)
            if (total[node][s] != 0) group[s].flow.add(node, total[node][s]);
        total[node] = Lanes{};
    }
}

// A thread's sums of one source are kept between its queries: they cost as much to make as a query.
struct Workspace {
    int64_t n = -1;
    std::optional<Sums> sums;
};
thread_local Workspace workspace;

Sums& sums_of_one(int64_t n) {
    if (workspace.n != n || !workspace.sums) {
        workspace.sums.emplace(n, 1);
        workspace.n = n;
    }
    return *workspace.sums;
}

// Every flow becomes flow @ matrix, with `plus` + what has stopped.
template <class Value>
void spread(std::vector<Source>& group, const Matrix<Value>& matrix, bool plus, int64_t n,
            std::optional<Sums>& together) {
    if (group.size() > 1 && n * GROUP <= CELLS) {
        int64_t separate = 0, shared = 0;
        NodeSet reached(n);
        for (const Source& source : group)
            for (int32_t node : source.flow.nodes) {
                separate += matrix.length(node);
                reached.insert(node);
            }
        std::vector<int32_t> rows;
        reached.drain(rows);
        for (int32_t row : rows) shared += matrix.length(row);
        if (shared * GROUP <= GAIN * separate) {
            if (!together) together.emplace(n, GROUP);
            spread_together(group, rows, matrix, plus, *together);
            return;
        }
    }
    fetch_first(group[0].flow, matrix);
    for (size_t s = 0; s < group.size(); ++s) {
        if (s + 1 < group.size()) fetch_first(group[s + 1].flow, matrix);
        spread_alone(group[s].flow, matrix, plus ? &group[s].stopped : nullptr, sums_of_one(n));
    }
}

// Removes the masses that are too small to be spread; returns their sum.
template <class Value>
double prune(Masses& flow, const Matrix<Value>& matrix, double threshold, int64_t most) {
    std::vector<uint8_t> cut(flow.size());
    if (threshold >= 0) {
        for (size_t i = 0; i < flow.size(); ++i)
            cut[i] = flow.mass[i] < static_cast<float>(threshold);
    } else {
        int64_t work = 0;
        for (int32_t node : flow.nodes) work += matrix.length(node);
        if (work <= most) return 0;
        std::vector<size_t> order(flow.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return flow.mass[a] > flow.mass[b]; });
        work = 0;
        for (size_t i : order) {
            work += matrix.length(flow.nodes[i]);
            cut[i] = work > most;
        }
    }
    double lost = 0;
    size_t kept = 0;
    for (size_t i = 0; i < flow.size(); ++i) {
        if (cut[i] && matrix.length(flow.nodes[i]) > 0) {
            lost += flow.mass[i];
            continue;
        }
        flow.nodes[kept] = flow.nodes[i];
        flow.mass[kept++] = flow.mass[i];
    }
    flow.resize(kept);
    return lost;
}

void stop(Source& source, float share) {
    for (size_t i = 0; i < source.flow.size(); ++i)
        source.stopped.add(source.flow.nodes[i], source.flow.mass[i] * share);
}

template <class Count>
void look_up(std::vector<Source>& group, const Query& query, std::optional<Sums>& together) {
    const Matrix<Count> visits{query.visit_ends, query.visit_nodes,
                               static_cast<const Count*>(query.visit_counts)};
    for (Source& source : group) {
        Masses& flow = source.flow;
        source.dropped += prune(flow, visits, query.threshold, query.work);
        for (size_t i = 0; i < flow.size(); ++i) {
            source.dropped += flow.mass[i] * query.missing[flow.nodes[i]];
            flow.mass[i] *= query.scale[flow.nodes[i]];
        }
    }
    spread(group, visits, true, query.n, together);
}

void stop_all(std::vector<Source>& group, const Query& query) {
    for (Source& source : group) {
        for (size_t i = 0; i < source.flow.size(); ++i)
            source.dropped += source.flow.mass[i] * query.missing[source.flow.nodes[i]];
        stop(source, static_cast<float>(query.restart));
        source.flow.clear();
        const Matrix<float> nothing{};
        spread_alone(source.flow, nothing, &source.stopped, sums_of_one(query.n));
    }
}

// The scores [n, sources] of a group are left in their flows, before they are normalised.
void follow(std::vector<Source>& group, const Query& query, std::optional<Sums>& together) {
    for (int64_t round = 0; round < query.rounds; ++round) {
        for (Source& source : group) {
            stop(source, static_cast<float>(query.restart));
            source.dropped += (1 - query.restart) *
                              prune(source.flow, query.onward, query.threshold, query.work);
        }
        spread(group, query.onward, false, query.n, together);
    }
    if (query.count_bytes == 2) look_up<uint16_t>(group, query, together);
    else if (query.count_bytes == 4) look_up<uint32_t>(group, query, together);
    else stop_all(group, query);
}

// Scores that sum to 1 with what was dropped, in place.
void normalise(Source& source) {
    double whole = source.dropped;
    for (float mass : source.flow.mass) whole += mass;
    const double factor = 1 / whole;
    for (float& mass : source.flow.mass) mass = static_cast<float>(mass * factor);
    source.dropped *= factor;
}

// The k best by falling score, the smaller node where equal.
void keep_best(Masses& scores, int64_t k) {
    struct Scored { float score; int32_t node; };
    const auto before = [](const Scored& a, const Scored& b) {
        return a.score != b.score ? a.score > b.score : a.node < b.node;
    };
    // The k-th largest of the largest scores of at least k parts is at most the k-th of all.
    const int64_t count = scores.size();
    std::vector<Scored> best(count);
    float least = 0;
    if (const int64_t part = count / (2 * k); part > 1) {
        std::vector<float> largest(2 * k);
        for (int64_t p = 0; p < 2 * k; ++p) {
            const float* first = scores.mass.data() + p * part;
            float most = 0;
            for (int64_t i = 0; i < part; ++i) most = first[i] > most ? first[i] : most;
            largest[p] = most;
        }
        std::nth_element(largest.begin(), largest.begin() + (k - 1), largest.end(),
                         std::greater<float>());
        least = largest[k - 1];
    }
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        best[found] = {scores.mass[i], scores.nodes[i]};
        found += scores.mass[i] >= least;
    }
    best.resize(found);
    if (found > k) {
        std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), before);
        best.resize(k);
    }
    std::sort(best.begin(), best.end(), before);
    scores.clear();
    for (const Scored& one : best) scores.add(one.node, one.score);
}

}  // namespace

// Answers `count` sources. `sizes` and `dropped` [count]; `nodes` and `scores` one source behind the
// other, with room for top_k (or n) of each. Returns 0, or 1 if there is not enough memory.
extern "C" int64_t anabranch_ppr(const Query* query, const int64_t* sources, int64_t count,
                                 int64_t* sizes, int32_t* nodes, float* scores, double* dropped) {
    try {
        std::optional<Sums> together;
        std::vector<Source> group;
        for (int64_t start = 0; start < count; start += GROUP) {
            const int64_t stop = std::min(start + GROUP, count);
            group.resize(stop - start);
            for (int64_t s = start; s < stop; ++s)
                group[s - start].start(static_cast<int32_t>(sources[s]));
            follow(group, *query, together);
            for (int64_t s = start; s < stop; ++s) {
                Source& source = group[s - start];
                normalise(source);
                if (query->top_k) keep_best(source.flow, query->top_k);
                sizes[s] = source.flow.size();
                dropped[s] = source.dropped;
                nodes = std::copy(source.flow.nodes.begin(), source.flow.nodes.end(), nodes);
                scores = std::copy(source.flow.mass.begin(), source.flow.mass.end(), scores);
            }
        }
        return 0;
    } catch (const std::bad_alloc&) {
        workspace.sums.reset();  // its sums may not be zero
        return 1;
    }
}
