// softmax_ce, softmax_stats and softmax_stats_backward for Python: checks labels, runs the rows over threads, reduces.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

// What Python passes for the inputs of every softmax operation: (logits, target, scale, bias, class_weight,
// ignore_index, soft_cap, target_override, target_override_grad) where target is the address of int64 labels or a view of
// probabilities.
template <class T>
SoftmaxInputs<T> inputs_of(const py::tuple& t) {
    SoftmaxInputs<T> inputs;
    inputs.logits = view_of(t[0]);
    if (py::isinstance<py::tuple>(t[1])) inputs.probabilities = view_of(t[1]);
    else inputs.labels = pointer<const int64_t>(t[1].cast<uintptr_t>());
    inputs.scale = pointer<const T>(t[2].cast<uintptr_t>());
    inputs.bias = pointer<const T>(t[3].cast<uintptr_t>());
    inputs.class_weight = pointer<const T>(t[4].cast<uintptr_t>());
    inputs.ignore_index = t[5].cast<int64_t>();
    inputs.soft_cap = t[6].cast<double>();
    inputs.target_override = pointer<const T>(t[7].cast<uintptr_t>());
    inputs.target_override_grad = pointer<const T>(t[8].cast<uintptr_t>());
    inputs.weight_sum = double(inputs.logits.num_classes);
    if (inputs.class_weight) {
        inputs.weight_sum = 0;
        for (int64_t j = 0; j < inputs.logits.num_classes; ++j) inputs.weight_sum += inputs.class_weight[j];
    }
    return inputs;
}

template <class T>
void check_labels(const SoftmaxInputs<T>& inputs) {
    if (!inputs.labels) return;
    const int64_t K = inputs.logits.num_classes, rows = inputs.logits.num_rows();
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t label = inputs.labels[row];
        if (label == inputs.ignore_index || (label >= 0 && label < K)) continue;
        throw py::index_error("target must lie in [0, " + std::to_string(K) + ") or be ignore_index=" +
                              std::to_string(inputs.ignore_index) + "; got label " + std::to_string(label) +
                              " at row " + std::to_string(row));
    }
}

// What the mean divides by, as torch does: the target weights of the rows kept, or the rows of soft targets.
template <class T>
double denominator(const SoftmaxInputs<T>& inputs) {
    const int64_t rows = inputs.logits.num_rows();
    if (!inputs.labels) return double(rows);
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row)
        if (inputs.labels[row] != inputs.ignore_index)
            sum += inputs.class_weight ? inputs.class_weight[inputs.labels[row]] : 1;
    // With no weight at all torch's mean is 0 / 0, whatever label smoothing adds to the sum.
    return sum == 0 ? std::numeric_limits<double>::quiet_NaN() : sum;
}

// Column sums dL/dscale and dL/dbias: one partial sum per thread, added in the order of the threads.
class ColumnSums {
public:
    ColumnSums(bool wanted, int64_t num_classes, int threads)
        : num_classes_(num_classes), threads_(threads), partial_(wanted ? 2 * num_classes * threads : 0) {}

    double* data() { return partial_.empty() ? nullptr : partial_.data(); }

    template <class T>
    void write(T* scale, T* bias) const {
        if (partial_.empty()) return;
        for (int64_t j = 0; j < num_classes_; ++j) {
            double scale_sum = 0, bias_sum = 0;
            for (int thread = 0; thread < threads_; ++thread) {
                scale_sum += partial_[2 * num_classes_ * thread + j];
                bias_sum += partial_[2 * num_classes_ * thread + num_classes_ + j];
            }
            scale[j] = T(scale_sum);
            bias[j] = T(bias_sum);
        }
    }

private:
    int64_t num_classes_;
    int threads_;
    std::vector<double> partial_;
};

int threads_for(const View& logits, int threads) {
    return useful_threads(logits.num_rows() * logits.num_classes, logits.num_rows(), threads);
}

// gradients: (view of dL/dlogits or None, address of dL/dscale, address of dL/dbias); options: (smoothing,
// row_smoothing, focal_gamma, z_loss, row_scale, mean, row_penalty, penalty strength, margin, share, mix,
// gradient_scale); outputs: (loss, row_loss, smoothing slope, dL/dlabel_logit, penalty slope).
template <class T>
void softmax_ce(const py::tuple& inputs, const py::tuple& options, const py::tuple& outputs, const py::tuple& gradients,
                int threads) {
    SoftmaxCE<T> call;
    call.inputs = inputs_of<T>(inputs);
    call.smoothing = options[0].cast<double>();
    call.row_smoothing = pointer<const T>(options[1].cast<uintptr_t>());
    call.focal_gamma = options[2].cast<double>();
    call.z_loss = options[3].cast<double>();
    call.row_scale = pointer<const T>(options[4].cast<uintptr_t>());
    const bool mean = options[5].cast<bool>();
    const double gradient_scale = options[11].cast<double>();
    call.row_penalty = pointer<const T>(options[6].cast<uintptr_t>());
    call.strength = options[7].cast<double>();
    call.penalty = {options[8].cast<double>(), options[9].cast<double>(), options[10].cast<bool>()};
    T* loss = pointer<T>(outputs[0].cast<uintptr_t>());
    call.row_loss = pointer<T>(outputs[1].cast<uintptr_t>());
    call.smoothing_slope = pointer<T>(outputs[2].cast<uintptr_t>());
    call.label_gradient = pointer<T>(outputs[3].cast<uintptr_t>());
    call.penalty_slope = pointer<T>(outputs[4].cast<uintptr_t>());
    call.gradients.logits = view_of(gradients[0]);
    T* grad_scale = pointer<T>(gradients[1].cast<uintptr_t>());
    T* grad_bias = pointer<T>(gradients[2].cast<uintptr_t>());

    py::gil_scoped_release release;
    check_labels(call.inputs);
    const View& logits = call.inputs.logits;
    threads = threads_for(logits, threads);
    const double share = mean ? 1.0 / denominator(call.inputs) : 1.0;
    call.common_scale = share * gradient_scale;
    ColumnSums columns(grad_scale != nullptr, logits.num_classes, threads);
    call.gradients.scale_bias = columns.data();
    use_huge_pages(call.gradients.logits);
    const auto kernel = kernels().softmax<T>().ce;
    parallel_ranges(logits.num_rows(), threads,
                    [&](int64_t first, int64_t last, int thread) { kernel(call, first, last, thread); });
    columns.write(grad_scale, grad_bias);
    double total = 0;
    for (int64_t row = 0; row < logits.num_rows(); ++row)
        total += call.row_scale ? double(call.row_scale[row]) * call.row_loss[row] : double(call.row_loss[row]);
    *loss = T(total * share);
}

// outputs: (row_max, row_sum, log_sum_exp, target_logit, cross_entropy, uniform, rest, hinge, confidence, prediction),
// 0 where not wanted.
template <class T>
void softmax_stats(const py::tuple& inputs, double penalty_margin, const py::tuple& outputs, int threads) {
    SoftmaxStatistics<T> call;
    call.inputs = inputs_of<T>(inputs);
    T** const fields[] = {&call.row_max,      &call.row_sum,       &call.log_sum_exp,
                          &call.target_logit, &call.cross_entropy, &call.uniform_cross_entropy,
                          &call.rest,         &call.hinge,         &call.confidence};
    for (size_t i = 0; i < 9; ++i) *fields[i] = pointer<T>(outputs[i].cast<uintptr_t>());
    call.prediction = pointer<int64_t>(outputs[9].cast<uintptr_t>());
    call.penalty_margin = penalty_margin;

    py::gil_scoped_release release;
    check_labels(call.inputs);
    const View& logits = call.inputs.logits;
    const auto kernel = kernels().softmax<T>().stats;
    parallel_ranges(logits.num_rows(), threads_for(logits, threads),
                    [&](int64_t first, int64_t last, int thread) { kernel(call, first, last, thread); });
}

// saved: (row_max, row_sum, rest); upstream: (log_sum_exp, target_logit, cross_entropy, uniform, rest, hinge), 0 where
// absent; gradients as above, then the address of dL/dlabel_logit.
template <class T>
void softmax_stats_backward(const py::tuple& inputs, double penalty_margin, const py::tuple& saved, const py::tuple& upstream,
                   const py::tuple& gradients, int threads) {
    SoftmaxStatisticsBackward<T> call;
    call.inputs = inputs_of<T>(inputs);
    const T** const fields[] = {&call.row_max,      &call.row_sum,       &call.rest_of_row,           &call.log_sum_exp,
                                &call.target_logit, &call.cross_entropy, &call.uniform_cross_entropy, &call.rest,
                                &call.hinge};
    for (size_t i = 0; i < 9; ++i)
        *fields[i] = pointer<const T>((i < 3 ? saved[i] : upstream[i - 3]).cast<uintptr_t>());
    call.penalty_margin = penalty_margin;
    call.label_gradient = pointer<T>(gradients[3].cast<uintptr_t>());
    call.gradients.logits = view_of(gradients[0]);
    T* grad_scale = pointer<T>(gradients[1].cast<uintptr_t>());
    T* grad_bias = pointer<T>(gradients[2].cast<uintptr_t>());

    py::gil_scoped_release release;
    const View& logits = call.inputs.logits;
    threads = threads_for(logits, threads);
    ColumnSums columns(grad_scale != nullptr, logits.num_classes, threads);
    call.gradients.scale_bias = columns.data();
    use_huge_pages(call.gradients.logits);
    const auto kernel = kernels().softmax<T>().sweep;
    parallel_ranges(logits.num_rows(), threads,
                    [&](int64_t first, int64_t last, int thread) { kernel(call, first, last, thread); });
    columns.write(grad_scale, grad_bias);
}

bool is_double(const py::tuple& inputs) { return view_of(inputs[0]).dtype == DType::float64; }

}  // namespace

void bind_softmax_ce(py::module_& module) {
    module.def("softmax_ce", [](const py::tuple& inputs, const py::tuple& options, const py::tuple& outputs,
                                const py::tuple& gradients, int threads) {
        return (is_double(inputs) ? softmax_ce<double> : softmax_ce<float>)(inputs, options, outputs, gradients,
                                                                            threads);
    });
    module.def("softmax_stats",
               [](const py::tuple& inputs, double penalty_margin, const py::tuple& outputs, int threads) {
                   return (is_double(inputs) ? softmax_stats<double> : softmax_stats<float>)(inputs, penalty_margin,
                                                                                             outputs, threads);
               });
    module.def("softmax_stats_backward", [](const py::tuple& inputs, double penalty_margin, const py::tuple& saved,
                                   const py::tuple& upstream, const py::tuple& gradients, int threads) {
        return (is_double(inputs) ? softmax_stats_backward<double> : softmax_stats_backward<float>)(inputs, penalty_margin, saved,
                                                                                  upstream, gradients, threads);
    });
}

}  // namespace fusedloss
