// class_stats for Python: checks labels, orders the rows by class, runs the segments over threads.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

struct Labels {
    const int64_t* data;
    int64_t rows, ignore_index;
};

// Where each class starts in the order by class, (K + 1,); an IndexError for a label outside [0, K).
std::vector<int64_t> class_offsets(const Labels& labels, int64_t num_classes) {
    std::vector<int64_t> offset(num_classes + 1, 0);
    for (int64_t row = 0; row < labels.rows; ++row) {
        const int64_t label = labels.data[row];
        if (label == labels.ignore_index) continue;
        if (label < 0 || label >= num_classes)
            throw py::index_error("labels must lie in [0, " + std::to_string(num_classes) + ") or be ignore_index=" +
                                  std::to_string(labels.ignore_index) + "; got label " + std::to_string(label) +
                                  " at row " + std::to_string(row));
        ++offset[label + 1];
    }
    for (int64_t label = 0; label < num_classes; ++label) offset[label + 1] += offset[label];
    return offset;
}

std::vector<int64_t> rows_by_class(const Labels& labels, std::vector<int64_t> offset) {
    std::vector<int64_t> order(offset.back());
    for (int64_t row = 0; row < labels.rows; ++row)
        if (labels.data[row] != labels.ignore_index) order[offset[labels.data[row]]++] = row;
    return order;
}

// The classes cut into segments of about the same length, the same for any number of threads.
struct Plan {
    std::vector<ClassSegment> segments;
    int64_t num_partials = 0;

    explicit Plan(const std::vector<int64_t>& offset) {
        const int64_t num_classes = int64_t(offset.size()) - 1;
        const int64_t longest = std::clamp<int64_t>(offset.back() / 256, 64, 1024);
        segments.reserve(num_classes + offset.back() / longest);
        for (int64_t label = 0; label < num_classes; ++label) {
            const int64_t first = offset[label], rows = offset[label + 1] - first;
            const int64_t pieces = std::max<int64_t>(1, (rows + longest - 1) / longest);
            for (int64_t piece = 0; piece < pieces; ++piece)
                segments.push_back({label, first + rows * piece / pieces, first + rows * (piece + 1) / pieces,
                                    pieces == 1 ? -1 : num_partials++});
        }
    }

    // The first segment of a share of the work; writing a class costs about as much as adding a row.
    int64_t boundary(int64_t share, int64_t shares) const {
        const int64_t count = int64_t(segments.size());
        if (share == shares) return count;
        const int64_t goal = (segments.back().last + count) * share / shares;
        int64_t low = 0, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (segments[middle].first + middle < goal) low = middle + 1;
            else high = middle;
        }
        return low;
    }
};

template <class T>
bool row_is_usable(const T* row, int64_t width) {
    int outside = 0;
    for (int64_t j = 0; j < width; ++j) outside |= !(row[j] <= T(kLargestValue) && row[j] >= -T(kLargestValue));
    return !outside;
}

// A class that has no mean yet is measured from its first usable row.
template <class T>
void start_new_classes(const ClassStats<T>& call, const std::vector<int64_t>& offset, const int64_t* seen) {
    std::vector<T> row(call.width());
    for (int64_t label = 0; label + 1 < int64_t(offset.size()); ++label) {
        if (seen[label] != 0) continue;
        for (int64_t i = offset[label]; i < offset[label + 1]; ++i) {
            kernels().class_stats<T>().widen(call, call.order[i], row.data());
            if (!row_is_usable(row.data(), call.width())) continue;
            std::copy(row.begin(), row.end(), call.shift + label * call.width());
            break;
        }
    }
}

template <class T>
void add_partials(const ClassStats<T>& call, const Plan& plan) {
    const int64_t size = call.slot_size();
    for (size_t index = 0; index < plan.segments.size();) {
        const ClassSegment& segment = plan.segments[index++];
        if (segment.partial < 0) continue;
        double* total = call.partials + segment.partial * size;
        for (; index < plan.segments.size() && plan.segments[index].label == segment.label; ++index) {
            const double* partial = call.partials + plan.segments[index].partial * size;
            for (int64_t j = 0; j < size; ++j) total[j] += partial[j];
        }
        kernels().class_stats<T>().write(call, segment.label, total);
    }
}

// Takes the rows that were left out from the counts; returns how many there are.
int64_t subtract_skipped(const Plan& plan, int64_t* count) {
    int64_t skipped = 0;
    for (const ClassSegment& segment : plan.segments) {
        count[segment.label] -= segment.skipped;
        skipped += segment.skipped;
    }
    return skipped;
}

// Fills call.sum, call.square and `count`; returns the number of rows left out.
template <class T>
int64_t class_stats(ClassStats<T>& call, const Labels& labels, int64_t num_classes, const int64_t* seen,
                    int64_t* count, int threads) {
    const std::vector<int64_t> offset = class_offsets(labels, num_classes);
    for (int64_t label = 0; label < num_classes; ++label) count[label] = offset[label + 1] - offset[label];
    if (num_classes == 0) return 0;
    const std::vector<int64_t> order = rows_by_class(labels, offset);
    call.order = order.data();
    call.num_kept = int64_t(order.size());
    Plan plan(offset);
    call.segments = plan.segments.data();
    threads = useful_threads((call.num_kept + num_classes) * call.width(), int64_t(plan.segments.size()), threads);
    std::vector<double> slots((plan.num_partials + threads) * call.slot_size());
    call.partials = slots.data();
    call.scratch = slots.data() + plan.num_partials * call.slot_size();
    start_new_classes(call, offset, seen);
    const auto kernel = kernels().class_stats<T>().sum;
    parallel_ranges(threads, threads, [&](int64_t first, int64_t last, int) {
        for (int64_t share = first; share < last; ++share)
            kernel(call, plan.boundary(share, threads), plan.boundary(share + 1, threads), int(share));
    });
    add_partials(call, plan);
    return subtract_skipped(plan, count);
}

template <class T>
void row_magnitudes(const View& rows, uintptr_t sum, int threads) {
    const RowMagnitudes<T> call{rows, pointer<T>(sum)};

    py::gil_scoped_release release;
    threads = useful_threads(rows.num_rows() * rows.num_classes, rows.num_rows(), threads);
    parallel_ranges(rows.num_rows(), threads, [&](int64_t first, int64_t last, int) {
        kernels().class_stats<T>().magnitudes(call, first, last);
    });
}

// Writes (count, mean, mean squared deviation, values left out) of the values whose label is kept; labels may be null.
template <class T>
void moments(const T* values, const Labels& labels, double* moments) {
    int64_t count = 0, skipped = 0;
    double sum = 0, square = 0;
    const auto usable = [&](int64_t row) { return std::abs(double(values[row])) <= kLargestValue; };
    const auto kept = [&](int64_t row) { return !labels.data || labels.data[row] != labels.ignore_index; };
    for (int64_t row = 0; row < labels.rows; ++row) {
        if (!kept(row)) continue;
        if (!usable(row)) {
            ++skipped;
            continue;
        }
        ++count;
        sum += values[row];
    }
    const double mean = count == 0 ? 0 : sum / count;
    for (int64_t row = 0; row < labels.rows; ++row)
        if (kept(row) && usable(row)) square += (values[row] - mean) * (values[row] - mean);
    moments[0] = double(count);
    moments[1] = mean;
    moments[2] = count == 0 ? 0 : square / count;
    moments[3] = double(skipped);
}

template <class T>
void run_class_stats(const View& features, const Labels& labels, int64_t num_classes, bool per_feature,
                         uintptr_t shift, uintptr_t seen, uintptr_t count, uintptr_t sum, uintptr_t square,
                         uintptr_t skipped, int threads) {
    ClassStats<T> call;
    call.features = features;
    call.per_feature = per_feature;
    call.shift = pointer<T>(shift);
    call.sum = pointer<T>(sum);
    call.square = pointer<T>(square);
    py::gil_scoped_release release;
    *pointer<int64_t>(skipped) =
        class_stats(call, labels, num_classes, pointer<const int64_t>(seen), pointer<int64_t>(count), threads);
}

}  // namespace

// Addresses are of contiguous tensors; `features` and `mean` are views (bindings.h).
void bind_class_stats(py::module_& module) {
    using py::arg;
    module.def(
        "class_stats",
        [](const py::object& features, uintptr_t labels, int64_t ignore_index, int64_t num_classes, bool per_feature,
           uintptr_t shift, uintptr_t seen, uintptr_t count, uintptr_t sum, uintptr_t square, uintptr_t skipped,
           int threads) {
            const View view = view_of(features);
            const Labels given{pointer<const int64_t>(labels), view.outer_size, ignore_index};
            const bool is_double = view.dtype == DType::float64;
            const auto run = is_double ? run_class_stats<double> : run_class_stats<float>;
            run(view, given, num_classes, per_feature, shift, seen, count, sum, square, skipped, threads);
        },
        arg("features"), arg("labels"), arg("ignore_index"), arg("num_classes"), arg("per_feature"), arg("shift"),
        arg("seen"), arg("count"), arg("sum"), arg("square"), arg("skipped"), arg("threads"));
    module.def(
        "update_class_stats",
        [](uintptr_t count, const py::object& mean, uintptr_t scatter, uintptr_t variance, uintptr_t rows,
           uintptr_t shift, uintptr_t sum, uintptr_t square, double momentum, int threads) {
            const View view = view_of(mean);
            const auto run = [&](auto zero) {
                using T = decltype(zero);
                ClassStatsUpdate<T> call;
                call.width = view.num_classes;
                call.momentum = momentum;
                call.count = pointer<int64_t>(count);
                call.mean = static_cast<T*>(view.data);
                call.scatter = pointer<double>(scatter);
                call.variance = pointer<T>(variance);
                call.rows = pointer<const int64_t>(rows);
                call.shift = pointer<const T>(shift);
                call.sum = pointer<T>(sum);
                call.square = pointer<T>(square);

                py::gil_scoped_release release;
                const int64_t num_classes = view.outer_size;
                threads = useful_threads(num_classes * call.width, num_classes, threads);
                parallel_ranges(num_classes, threads, [&](int64_t first, int64_t last, int) {
                    kernels().class_stats<T>().update(call, first, last);
                });
            };
            if (view.dtype == DType::float64) run(0.0);
            else run(0.0f);
        },
        arg("count"), arg("mean"), arg("scatter"), arg("variance"), arg("rows"), arg("shift"), arg("sum"),
        arg("square"), arg("momentum"), arg("threads"));
    module.def(
        "row_magnitudes",
        [](const py::object& rows, uintptr_t sum, int threads) {
            const View view = view_of(rows);
            (view.dtype == DType::float64 ? row_magnitudes<double> : row_magnitudes<float>)(view, sum, threads);
        },
        arg("rows"), arg("sum"), arg("threads"));
    module.def(
        "moments",
        [](uintptr_t values, bool is_double, int64_t num_values, uintptr_t labels, int64_t ignore_index,
           uintptr_t moments_out) {
            const Labels given{pointer<const int64_t>(labels), num_values, ignore_index};
            double* out = pointer<double>(moments_out);
            py::gil_scoped_release release;
            if (is_double) moments(pointer<const double>(values), given, out);
            else moments(pointer<const float>(values), given, out);
        },
        arg("values"), arg("is_double"), arg("num_values"), arg("labels"), arg("ignore_index"), arg("moments"));
}

}  // namespace fusedloss
