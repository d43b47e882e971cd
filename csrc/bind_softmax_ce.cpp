// softmax_ce, softmax_stats and softmax_stats_backward for Python: runs the rows over threads, reduces.
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

// The named tuples of core/operands.py with addresses of contiguous tensors (0 for None) and views in place of tensors.
struct LogitArguments {
    View logits, probabilities;  // the second is empty with labels
    uintptr_t labels = 0, scale = 0, bias = 0, class_weight = 0, target_override = 0, target_override_grad = 0;
    double soft_cap = 0;
    int64_t ignore_index = -100;

    template <class T>
    LogitInputs<T> inputs() const {
        LogitInputs<T> inputs;
        inputs.logits = logits;
        inputs.probabilities = probabilities;
        inputs.labels = pointer<const int64_t>(labels);
        inputs.scale = pointer<const T>(scale);
        inputs.bias = pointer<const T>(bias);
        inputs.class_weight = pointer<const T>(class_weight);
        inputs.target_override = pointer<const T>(target_override);
        inputs.target_override_grad = pointer<const T>(target_override_grad);
        inputs.soft_cap = soft_cap;
        inputs.ignore_index = ignore_index;
        inputs.weight_sum = double(logits.num_classes);
        if (inputs.class_weight) {
            inputs.weight_sum = 0;
            for (int64_t j = 0; j < logits.num_classes; ++j) inputs.weight_sum += inputs.class_weight[j];
        }
        return inputs;
    }
};

struct RowArguments {
    uintptr_t label_smoothing = 0, sample_weight = 0, penalty_strength = 0;
};

struct GradArguments {
    View logits;
    uintptr_t scale = 0, bias = 0, target_override = 0, label_smoothing = 0, penalty_strength = 0;
};

struct StatisticsArguments {
    uintptr_t row_max = 0, row_sum = 0, log_sum_exp = 0, target_logit = 0, cross_entropy = 0, smooth_loss = 0;
    uintptr_t one_minus_pt = 0, hinge = 0, prediction = 0, confidence = 0;
};

struct SavedArguments {
    uintptr_t row_max = 0, row_sum = 0, one_minus_pt = 0;
};

struct StatisticsGradArguments {
    uintptr_t log_sum_exp = 0, target_logit = 0, cross_entropy = 0, smooth_loss = 0, one_minus_pt = 0, hinge = 0;
};

void check_labels(uintptr_t labels, int64_t count, int64_t num_classes, int64_t ignore_index, const std::string& name) {
    py::gil_scoped_release release;
    const int64_t* label = pointer<const int64_t>(labels);
    // Without a way out of the loop, which is vectorised then.
    bool any = false;
    for (int64_t row = 0; row < count; ++row)
        any |= (label[row] != ignore_index) & (static_cast<uint64_t>(label[row]) >= static_cast<uint64_t>(num_classes));
    if (!any) return;
    for (int64_t row = 0; row < count; ++row) {
        if (label[row] == ignore_index || class_or_none(label[row], num_classes, ignore_index) >= 0) continue;
        throw py::index_error(name + " must lie in [0, " + std::to_string(num_classes) + ") or be ignore_index=" +
                              std::to_string(ignore_index) + "; got label " + std::to_string(label[row]) + " at row " +
                              std::to_string(row));
    }
}

// What the mean divides by, as torch does: the target weights of the rows kept, or the rows of soft targets.
template <class T>
double denominator(const LogitInputs<T>& inputs) {
    const int64_t rows = inputs.logits.num_rows();
    if (!inputs.labels) return double(rows);
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t label = inputs.label_of(row);
        if (label >= 0) sum += inputs.weight_of(label);
    }
    // With no weight at all torch's mean is 0 / 0, whatever label smoothing adds to the sum.
    return sum == 0 ? std::numeric_limits<double>::quiet_NaN() : sum;
}

// Column sums dL/dscale and dL/dbias: one partial sum per thread, added in the order of the threads.
class ColumnSums {
public:
    ColumnSums(bool needed, int64_t num_classes, int threads)
        : num_classes_(num_classes), threads_(threads), partial_(needed ? 2 * num_classes * threads : 0) {}

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

// Runs a kernel that writes gradients over all rows.
template <class T, class Call, class Kernel>
void run_with_grads(Call& call, const GradArguments& grads, int threads, Kernel kernel) {
    const View& logits = call.inputs.logits;
    threads = threads_for(logits, threads);
    ColumnSums columns(grads.scale != 0, logits.num_classes, threads);
    call.grads.logits = grads.logits;
    call.grads.scale_bias = columns.data();
    call.grads.target_override = pointer<T>(grads.target_override);
    call.grads.label_smoothing = pointer<T>(grads.label_smoothing);
    call.grads.penalty_strength = pointer<T>(grads.penalty_strength);
    use_huge_pages(call.grads.logits);
    parallel_ranges(logits.num_rows(), threads,
                    [&](int64_t first, int64_t last, int thread) { kernel(call, first, last, thread); });
    columns.write(pointer<T>(grads.scale), pointer<T>(grads.bias));
}

template <class T>
void softmax_ce(const LogitArguments& inputs, const RowArguments& rows, const RowOptions& options, bool mean,
                double grad_scale, uintptr_t loss, uintptr_t row_loss, const GradArguments& grads, int threads) {
    py::gil_scoped_release release;
    SoftmaxCE<T> call;
    call.inputs = inputs.inputs<T>();
    call.rows.label_smoothing = pointer<const T>(rows.label_smoothing);
    call.rows.sample_weight = pointer<const T>(rows.sample_weight);
    call.rows.penalty_strength = pointer<const T>(rows.penalty_strength);
    call.options = options;
    call.row_loss = pointer<T>(row_loss);
    const double share = mean ? 1.0 / denominator(call.inputs) : 1.0;
    call.loss_scale = share * grad_scale;
    run_with_grads<T>(call, grads, threads, kernels().softmax<T>().ce);
    double total = 0;
    const T* weight = call.rows.sample_weight;
    for (int64_t row = 0; row < call.inputs.logits.num_rows(); ++row)
        total += weight ? double(weight[row]) * call.row_loss[row] : double(call.row_loss[row]);
    *pointer<T>(loss) = T(total * share);
}

template <class T>
void softmax_stats(const LogitArguments& inputs, double penalty_margin, const StatisticsArguments& statistics,
                   int threads) {
    py::gil_scoped_release release;
    SoftmaxStatistics<T> call;
    call.inputs = inputs.inputs<T>();
    call.penalty_margin = penalty_margin;
    call.row_max = pointer<T>(statistics.row_max);
    call.row_sum = pointer<T>(statistics.row_sum);
    call.log_sum_exp = pointer<T>(statistics.log_sum_exp);
    call.target_logit = pointer<T>(statistics.target_logit);
    call.cross_entropy = pointer<T>(statistics.cross_entropy);
    call.smooth_loss = pointer<T>(statistics.smooth_loss);
    call.one_minus_pt = pointer<T>(statistics.one_minus_pt);
    call.hinge = pointer<T>(statistics.hinge);
    call.prediction = pointer<int64_t>(statistics.prediction);
    call.confidence = pointer<T>(statistics.confidence);
    const View& logits = call.inputs.logits;
    const auto kernel = kernels().softmax<T>().stats;
    parallel_ranges(logits.num_rows(), threads_for(logits, threads),
                    [&](int64_t first, int64_t last, int thread) { kernel(call, first, last, thread); });
}

template <class T>
void softmax_stats_backward(const LogitArguments& inputs, const SavedArguments& saved, double penalty_margin,
                            const StatisticsGradArguments& upstream, const GradArguments& grads, int threads) {
    py::gil_scoped_release release;
    SoftmaxStatisticsBackward<T> call;
    call.inputs = inputs.inputs<T>();
    call.saved.row_max = pointer<const T>(saved.row_max);
    call.saved.row_sum = pointer<const T>(saved.row_sum);
    call.saved.one_minus_pt = pointer<const T>(saved.one_minus_pt);
    call.penalty_margin = penalty_margin;
    call.upstream.log_sum_exp = pointer<const T>(upstream.log_sum_exp);
    call.upstream.target_logit = pointer<const T>(upstream.target_logit);
    call.upstream.cross_entropy = pointer<const T>(upstream.cross_entropy);
    call.upstream.smooth_loss = pointer<const T>(upstream.smooth_loss);
    call.upstream.one_minus_pt = pointer<const T>(upstream.one_minus_pt);
    call.upstream.hinge = pointer<const T>(upstream.hinge);
    run_with_grads<T>(call, grads, threads, kernels().softmax<T>().stats_backward);
}

// Picks the compute type by that of the logits.
template <class... Arguments>
auto by_dtype(void (*of_float)(const LogitArguments&, Arguments...),
              void (*of_double)(const LogitArguments&, Arguments...)) {
    return [=](const LogitArguments& inputs, Arguments... arguments) {
        (inputs.logits.dtype == DType::float64 ? of_double : of_float)(inputs, arguments...);
    };
}

// A constructor of one number for each index.
template <std::size_t... I>
auto row_options_init(std::index_sequence<I...>) {
    return py::init<std::enable_if_t<(I < kNumRowOptions), double>...>();
}

void bind_row_options(py::module_& module) {
    py::class_<RowOptions> options(module, "RowOptions");
#define FUSEDLOSS_ARGUMENT(name, value) , py::arg(#name) = value
    options.def(row_options_init(std::make_index_sequence<kNumRowOptions>()) FUSEDLOSS_ROW_OPTIONS(FUSEDLOSS_ARGUMENT));
#undef FUSEDLOSS_ARGUMENT
#define FUSEDLOSS_READABLE(name, value) options.def_readonly(#name, &RowOptions::name);
    FUSEDLOSS_ROW_OPTIONS(FUSEDLOSS_READABLE)
#undef FUSEDLOSS_READABLE
}

LogitArguments logit_arguments(const py::tuple& logits, const py::object& target, uintptr_t scale, uintptr_t bias,
                               uintptr_t class_weight, uintptr_t target_override, uintptr_t target_override_grad,
                               double soft_cap, int64_t ignore_index) {
    LogitArguments arguments{view_of(logits),      View(),   0,           scale, bias, class_weight, target_override,
                             target_override_grad, soft_cap, ignore_index};
    if (py::isinstance<py::tuple>(target)) arguments.probabilities = view_of(target);
    else arguments.labels = target.cast<uintptr_t>();
    return arguments;
}

GradArguments grad_arguments(const py::object& logits, uintptr_t scale, uintptr_t bias, uintptr_t target_override,
                             uintptr_t label_smoothing, uintptr_t penalty_strength) {
    return {view_of(logits), scale, bias, target_override, label_smoothing, penalty_strength};
}

void bind_operands(py::module_& module) {
    using A = uintptr_t;
    py::class_<LogitArguments>(module, "LogitInputs")
        .def(py::init(&logit_arguments), py::arg("logits"), py::arg("target"), py::arg("scale") = 0,
             py::arg("bias") = 0, py::arg("class_weight") = 0, py::arg("target_override") = 0,
             py::arg("target_override_grad") = 0, py::arg("soft_cap") = 0.0, py::arg("ignore_index") = -100);
    py::class_<RowArguments>(module, "RowInputs")
        .def(py::init<A, A, A>(), py::arg("label_smoothing") = 0, py::arg("sample_weight") = 0,
             py::arg("penalty_strength") = 0);
    py::class_<GradArguments>(module, "SoftmaxGrads")
        .def(py::init(&grad_arguments), py::arg("logits") = py::none(), py::arg("scale") = 0, py::arg("bias") = 0,
             py::arg("target_override") = 0, py::arg("label_smoothing") = 0, py::arg("penalty_strength") = 0);
    py::class_<StatisticsArguments>(module, "SoftmaxStatistics")
        .def(py::init<A, A, A, A, A, A, A, A, A, A>(), py::arg("row_max"), py::arg("row_sum"), py::arg("log_sum_exp"),
             py::arg("target_logit"), py::arg("cross_entropy"), py::arg("smooth_loss"), py::arg("one_minus_pt"),
             py::arg("hinge"), py::arg("prediction"), py::arg("confidence"));
    py::class_<SavedArguments>(module, "SavedStatistics")
        .def(py::init<A, A, A>(), py::arg("row_max"), py::arg("row_sum"), py::arg("one_minus_pt"));
    py::class_<StatisticsGradArguments>(module, "StatisticsGrads")
        .def(py::init<A, A, A, A, A, A>(), py::arg("log_sum_exp") = 0, py::arg("target_logit") = 0,
             py::arg("cross_entropy") = 0, py::arg("smooth_loss") = 0, py::arg("one_minus_pt") = 0,
             py::arg("hinge") = 0);
}

}  // namespace

void bind_softmax_ce(py::module_& module) {
    bind_row_options(module);
    bind_operands(module);
    module.def("check_labels", &check_labels, py::arg("labels"), py::arg("count"), py::arg("num_classes"),
               py::arg("ignore_index"), py::arg("name"), "IndexError for the first label that is no class.");
    module.def("softmax_ce", by_dtype(&softmax_ce<float>, &softmax_ce<double>), py::arg("inputs"), py::arg("rows"),
               py::arg("options"), py::arg("mean"), py::arg("grad_scale"), py::arg("loss"), py::arg("row_loss"),
               py::arg("grads"), py::arg("threads"));
    module.def("softmax_stats", by_dtype(&softmax_stats<float>, &softmax_stats<double>), py::arg("inputs"),
               py::arg("penalty_margin"), py::arg("statistics"), py::arg("threads"));
    module.def("softmax_stats_backward", by_dtype(&softmax_stats_backward<float>, &softmax_stats_backward<double>),
               py::arg("inputs"), py::arg("saved"), py::arg("penalty_margin"), py::arg("upstream"), py::arg("grads"),
               py::arg("threads"));
}

}  // namespace fusedloss
