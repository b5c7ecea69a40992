#include "quantize/search.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "core/parallel.h"
#include "quantize/codes.h"

namespace zo {

namespace {

constexpr int64_t LARGEST_FACTOR = 4096;  // columns; beyond, only descent, unless whole rows are free
constexpr int64_t WIDE           = 512;   // columns; rows with more go through all threads one after another
constexpr int64_t MANY_TILES     = 8;     // and so do groups of many rows

// Rows with free weights in the same blocks.
struct row_group {
    std::vector<int32_t> blocks;  // of a row
    std::vector<int64_t> rows;    // index of each row's first block in the problem

    int64_t n_tiles() const { return ((int64_t) rows.size() + TILE_ROWS - 1) / TILE_ROWS; }
};

std::vector<row_group> group_rows(const code_problem & problem, int64_t blocks_per_row) {
    std::map<std::vector<int32_t>, std::vector<int64_t>> found;
    for (int64_t first = 0; first < problem.n_blocks;) {
        const int64_t        row = problem.ids[first] / blocks_per_row;
        std::vector<int32_t> blocks;
        int64_t              end = first;
        for (; end < problem.n_blocks && problem.ids[end] / blocks_per_row == row; ++end) {
            blocks.push_back((int32_t) (problem.ids[end] % blocks_per_row));
        }
        found[std::move(blocks)].push_back(first);
        first = end;
    }
    std::vector<row_group> groups;
    for (auto & [blocks, rows] : found) {
        groups.push_back({ blocks, std::move(rows) });
    }
    return groups;
}

class group_search {
public:
    group_search(const block_layout & layout, zo_moments & moments, const code_problem & problem,
                 const row_group & group, int n_threads)
        : layout_(layout), problem_(problem), group_(group), m_((int64_t) group.blocks.size() * layout.block),
          is_whole_(m_ == moments.inputs.h.n) {
        find_columns(moments.inputs);
        in_order_ = is_whole_ || m_ <= LARGEST_FACTOR;
        as_is_    = !is_whole_ || m_ <= WIDE;  // in others it is hardly ever better
        if (is_whole_) {
            h_     = &moments.inputs.h;
            ridge_ = ridge_level(*h_, problem.ridge);
            if (moments.factor_ridge != problem.ridge) {
                moments.factor       = square_matrix();  // never two in memory
                moments.factor_ridge = -1;
                moments.factor       = upper_factor(*h_, ridge_, n_threads);
                moments.factor_ridge = problem.ridge;
            }
            factor_ = &moments.factor;
            return;
        }
        own_h_ = square_matrix(m_);
        for (int64_t i = 0; i < m_; ++i) {
            for (int64_t j = 0; j < m_; ++j) {
                own_h_.row(i)[j] = moments.inputs.h.row(ranks_[(size_t) i])[ranks_[(size_t) j]];
            }
        }
        h_     = &own_h_;
        ridge_ = ridge_level(*h_, problem.ridge);
        if (in_order_) {
            own_factor_ = upper_factor(*h_, ridge_, n_threads);
        }
        factor_ = &own_factor_;
    }

    // Searches the rows of a tile; returns the sum of their e H e.
    double search(int64_t number, uint8_t * best) const {
        const int64_t first = number * TILE_ROWS;
        row_tile      tile;
        tile.resize(std::min(TILE_ROWS, (int64_t) group_.rows.size() - first), m_);
        tile.h      = h_;
        tile.factor = factor_;
        tile.ridge  = ridge_;
        set_target(first, tile);
        std::vector<double> losses((size_t) tile.n_rows, 0.0), plain(losses), least(losses), result(losses);
        bool                none = true;
        for (int32_t start = 0; start < problem_.n_starts; ++start) {
            for (const bool in_order : { false, true }) {
                if (in_order ? !in_order_ : !as_is_) {
                    continue;
                }
                set_start(first, start, tile);
                if (in_order) {
                    choose_in_order(layout_, tile);
                }
                descend(layout_, tile, problem_.sweeps, losses.data(), plain.data());
                for (int64_t i = 0; i < tile.n_rows; ++i) {
                    if (none || losses[(size_t) i] < least[(size_t) i]) {
                        least[(size_t) i]  = losses[(size_t) i];
                        result[(size_t) i] = plain[(size_t) i];
                        write_row(tile, i, first, start, best);
                    }
                }
                none = false;
            }
        }
        return std::accumulate(result.begin(), result.end(), 0.0);
    }

private:
    // places_[k]: where the k-th column by falling mean square lies among the row's free weights.
    void find_columns(const input_moments & inputs) {
        std::vector<int32_t> columns;
        for (const int32_t block : group_.blocks) {
            for (int32_t i = 0; i < layout_.block; ++i) {
                columns.push_back(block * layout_.block + i);
            }
        }
        places_.resize(columns.size());
        std::iota(places_.begin(), places_.end(), 0);
        const auto rank = [&](int32_t place) { return inputs.rank[(size_t) columns[(size_t) place]]; };
        std::sort(places_.begin(), places_.end(), [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
        for (const int32_t place : places_) {
            ranks_.push_back(rank(place));
        }
    }

    const uint8_t * start_block(int32_t start, int64_t block) const {
        return problem_.starts + (start * problem_.n_blocks + block) * layout_.block_bytes;
    }

    void set_target(int64_t first, row_tile & tile) const {
        for (int64_t i = 0; i < tile.n_rows; ++i) {
            const float * target = problem_.target + group_.rows[(size_t) (first + i)] * layout_.block;
            for (int64_t k = 0; k < m_; ++k) {
                tile.target[(size_t) (i * m_ + k)] = target[places_[(size_t) k]];
            }
        }
    }

    // Steps, offsets and levels of a start's blocks.
    void set_start(int64_t first, int32_t start, row_tile & tile) const {
        std::vector<float> step((size_t) m_), offset((size_t) m_), level((size_t) m_);
        block_values       values;
        for (int64_t i = 0; i < tile.n_rows; ++i) {
            for (size_t b = 0; b < group_.blocks.size(); ++b) {
                read_block(layout_, start_block(start, group_.rows[(size_t) (first + i)] + (int64_t) b),
                           values);
                for (int j = 0; j < layout_.block; ++j) {
                    const size_t to = b * (size_t) layout_.block + (size_t) j;
                    step[to]        = values.step(j / layout_.group);
                    offset[to]      = values.offset(j / layout_.group);
                    level[to]       = layout_.levels[values.level[j]];
                }
            }
            for (int64_t k = 0; k < m_; ++k) {
                const size_t from = (size_t) places_[(size_t) k], to = (size_t) (i * m_ + k);
                tile.step[to]   = step[from];
                tile.offset[to] = offset[from];
                tile.level[to]  = level[from];
            }
        }
    }

    void write_row(const row_tile & tile, int64_t i, int64_t first, int32_t start, uint8_t * best) const {
        std::vector<uint8_t> levels((size_t) m_);
        for (int64_t k = 0; k < m_; ++k) {
            levels[(size_t) places_[(size_t) k]] =
                (uint8_t) layout_.level_of(tile.level[(size_t) (i * m_ + k)]);
        }
        block_values values;
        for (size_t b = 0; b < group_.blocks.size(); ++b) {
            const int64_t   block = group_.rows[(size_t) (first + i)] + (int64_t) b;
            const uint8_t * from  = start_block(start, block);
            uint8_t *       to    = best + block * layout_.block_bytes;
            std::memcpy(to, from, (size_t) layout_.block_bytes);
            read_block(layout_, from, values);
            std::memcpy(values.level, levels.data() + b * (size_t) layout_.block, (size_t) layout_.block);
            write_block(layout_, values, to);
        }
    }

    const block_layout & layout_;
    const code_problem & problem_;
    const row_group &    group_;
    int64_t              m_;  // free weights of a row
    bool                 is_whole_, in_order_ = false, as_is_ = false;
    std::vector<int32_t> places_, ranks_;  // of the free weights, sorted
    square_matrix        own_h_, own_factor_;
    const square_matrix *h_ = nullptr, *factor_ = nullptr;
    float                ridge_ = 0;
};

}  // namespace

double choose_codes(const block_layout & layout, zo_moments & moments, const code_problem & problem,
                    int n_threads, uint8_t * best) {
    std::vector<row_group> wide, narrow;
    for (row_group & group : group_rows(problem, moments.inputs.h.n / layout.block)) {
        const int64_t m       = (int64_t) group.blocks.size() * layout.block;
        const bool    is_wide = m > WIDE || m == moments.inputs.h.n || group.n_tiles() >= MANY_TILES;
        (is_wide ? wide : narrow).push_back(std::move(group));
    }
    double total = 0;
    for (const row_group & group : wide) {
        const group_search  search(layout, moments, problem, group, n_threads);
        std::vector<double> losses((size_t) group.n_tiles());
        parallel_for(group.n_tiles(), n_threads,
                     [&](int64_t tile, int) { losses[(size_t) tile] = search.search(tile, best); });
        total = std::accumulate(losses.begin(), losses.end(), total);
    }
    std::vector<double> losses(narrow.size());
    parallel_for((int64_t) narrow.size(), n_threads, [&](int64_t i, int) {
        const row_group &  group = narrow[(size_t) i];
        const group_search search(layout, moments, problem, group, 1);
        for (int64_t tile = 0; tile < group.n_tiles(); ++tile) {
            losses[(size_t) i] += search.search(tile, best);
        }
    });
    return std::accumulate(losses.begin(), losses.end(), total);
}

}  // namespace zo
