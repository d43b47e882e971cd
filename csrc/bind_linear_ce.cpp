// What linear_ce needs beside matrix products and the softmax sweep, for Python: runs rows over threads.
#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

int threads_for(int64_t rows, int64_t width, int threads) { return useful_threads(rows * width, rows, threads); }

void row_norms(const py::object& rows, uintptr_t norm, int threads) {
    RowNorms call;
    call.rows = view_of(rows);
    call.norm = pointer<double>(norm);

    py::gil_scoped_release release;
    const int64_t count = call.rows.num_rows();
    parallel_ranges(count, threads_for(count, call.rows.num_classes, threads),
                    [&](int64_t first, int64_t last, int) { kernels().linear.norms(call, first, last); });
}

// gradient: (address, whether it is float64).
void project_rows(const py::object& rows, uintptr_t norm, const py::tuple& gradient, bool divide, int threads) {
    const View view = view_of(rows);
    const auto address = gradient[0].cast<uintptr_t>();
    const bool is_double = gradient[1].cast<bool>();
    const auto* norms = pointer<const double>(norm);

    py::gil_scoped_release release;
    const int64_t count = view.num_rows();
    threads = threads_for(count, view.num_classes, threads);
    parallel_ranges(count, threads, [&](int64_t first, int64_t last, int) {
        if (is_double) kernels().linear.project_double({view, norms, pointer<double>(address), divide}, first, last);
        else kernels().linear.project_float({view, norms, pointer<float>(address), divide}, first, last);
    });
}

// (input, weight, labels, ignore_index, norms of input, norms of weight, products).
LabelPairs pairs_of(const py::tuple& t) {
    LabelPairs pairs;
    pairs.input = view_of(t[0]);
    pairs.weight = view_of(t[1]);
    pairs.labels = pointer<const int64_t>(t[2].cast<uintptr_t>());
    pairs.ignore_index = t[3].cast<int64_t>();
    pairs.input_norm = pointer<const double>(t[4].cast<uintptr_t>());
    pairs.weight_norm = pointer<const double>(t[5].cast<uintptr_t>());
    pairs.product = pointer<double>(t[6].cast<uintptr_t>());
    return pairs;
}

void target_products(const py::tuple& inputs, int threads) {
    const LabelPairs pairs = pairs_of(inputs);

    py::gil_scoped_release release;
    const int64_t count = pairs.input.num_rows();
    parallel_ranges(count, threads_for(count, pairs.input.num_classes, threads),
                    [&](int64_t first, int64_t last, int) { kernels().linear.target_products(pairs, first, last); });
}

// gradients: (address of the input's, of the weight's), 0 where not wanted.
template <class T>
void label_gradients(const py::tuple& inputs, uintptr_t slope, const py::tuple& gradients, int threads) {
    LabelGradients<T> call;
    call.pairs = pairs_of(inputs);
    call.slope = pointer<const double>(slope);
    call.input = pointer<T>(gradients[0].cast<uintptr_t>());
    call.weight = pointer<T>(gradients[1].cast<uintptr_t>());

    py::gil_scoped_release release;
    const auto kernel = kernels().linear.label_gradients<T>();
    const int64_t rows = call.pairs.input.num_rows();
    threads = threads_for(rows, call.pairs.input.num_classes, threads);
    for (const bool of_weight : {false, true})
        if (of_weight ? call.weight != nullptr : call.input != nullptr)
            parallel_ranges(of_weight ? call.pairs.weight.num_rows() : rows, threads,
                            [&](int64_t first, int64_t last, int) { kernel(call, of_weight, first, last); });
}

}  // namespace

void bind_linear_ce(py::module_& module) {
    module.def("row_norms", row_norms);
    module.def("project_rows", project_rows);
    module.def("target_products", target_products);
    module.def("label_gradients",
               [](const py::tuple& inputs, uintptr_t slope, const py::tuple& gradients, bool is_double, int threads) {
                   (is_double ? label_gradients<double> : label_gradients<float>)(inputs, slope, gradients, threads);
               });
    module.def("use_huge_pages", [](const py::object& view) { use_huge_pages(view_of(view)); });
}

}  // namespace fusedloss
