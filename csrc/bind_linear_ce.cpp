// What linear_ce needs beside matrix products and the softmax sweep, for Python: runs rows over threads.
#include "bindings.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

int threads_for(int64_t rows, int64_t width, int threads) { return useful_threads(rows * width, rows, threads); }

void row_norms(const py::tuple& rows, uintptr_t norm, int threads) {
    RowNorms call;
    call.rows = view_of(rows);
    call.norm = pointer<double>(norm);

    py::gil_scoped_release release;
    const int64_t count = call.rows.num_rows();
    parallel_ranges(count, threads_for(count, call.rows.num_classes, threads),
                    [&](int64_t first, int64_t last, int) { kernels().linear.norms(call, first, last); });
}

void project_rows(const py::tuple& rows, uintptr_t norm, uintptr_t grad, bool is_double, bool divide, int threads) {
    const View view = view_of(rows);
    const auto* norms = pointer<const double>(norm);

    py::gil_scoped_release release;
    const int64_t count = view.num_rows();
    threads = threads_for(count, view.num_classes, threads);
    parallel_ranges(count, threads, [&](int64_t first, int64_t last, int) {
        if (is_double) kernels().linear.project_double({view, norms, pointer<double>(grad), divide}, first, last);
        else kernels().linear.project_float({view, norms, pointer<float>(grad), divide}, first, last);
    });
}

// LinearInputs of core/operands.py, as far as products of targets are concerned, with addresses and views.
TargetPairs target_pairs(const py::tuple& input, const py::tuple& weight, uintptr_t target, uintptr_t input_norm,
                         uintptr_t class_norm, uintptr_t target_product, int64_t ignore_index) {
    TargetPairs pairs;
    pairs.input = view_of(input);
    pairs.weight = view_of(weight);
    pairs.labels = pointer<const int64_t>(target);
    pairs.ignore_index = ignore_index;
    pairs.input_norm = pointer<const double>(input_norm);
    pairs.class_norm = pointer<const double>(class_norm);
    pairs.product = pointer<double>(target_product);
    return pairs;
}

// Writes the products.
void target_products(const TargetPairs& pairs, int threads) {
    py::gil_scoped_release release;
    const int64_t count = pairs.input.num_rows();
    parallel_ranges(count, threads_for(count, pairs.input.num_classes, threads),
                    [&](int64_t first, int64_t last, int) { kernels().linear.target_products(pairs, first, last); });
}

template <class T>
void add_target_grads(const TargetPairs& pairs, uintptr_t grad_product, uintptr_t grad_input, uintptr_t grad_weight,
                      int threads) {
    py::gil_scoped_release release;
    TargetGrads<T> call;
    call.pairs = pairs;
    call.grad_product = pointer<const double>(grad_product);
    call.input = pointer<T>(grad_input);
    call.weight = pointer<T>(grad_weight);
    const auto kernel = kernels().linear.add_target_grads<T>();
    const int64_t rows = pairs.input.num_rows();
    threads = threads_for(rows, pairs.input.num_classes, threads);
    for (const bool of_weight : {false, true})
        if (of_weight ? call.weight != nullptr : call.input != nullptr)
            parallel_ranges(of_weight ? pairs.weight.num_rows() : rows, threads,
                            [&](int64_t first, int64_t last, int) { kernel(call, of_weight, first, last); });
}

}  // namespace

void bind_linear_ce(py::module_& module) {
    module.def("row_norms", &row_norms, py::arg("rows"), py::arg("norm"), py::arg("threads"));
    module.def("project_rows", &project_rows, py::arg("rows"), py::arg("norm"), py::arg("grad"), py::arg("is_double"),
               py::arg("divide"), py::arg("threads"));
    py::class_<TargetPairs>(module, "TargetPairs")
        .def(py::init(&target_pairs), py::arg("input"), py::arg("weight"), py::arg("target"), py::arg("input_norm"),
             py::arg("class_norm"), py::arg("target_product"), py::arg("ignore_index"));
    module.def("target_products", &target_products, py::arg("pairs"), py::arg("threads"));
    module.def(
        "add_target_grads",
        [](const TargetPairs& pairs, uintptr_t grad_product, uintptr_t grad_input, uintptr_t grad_weight,
           bool is_double, int threads) {
            (is_double ? add_target_grads<double> : add_target_grads<float>)(pairs, grad_product, grad_input,
                                                                             grad_weight, threads);
        },
        py::arg("pairs"), py::arg("grad_product"), py::arg("grad_input"), py::arg("grad_weight"), py::arg("is_double"),
        py::arg("threads"));
    module.def("use_huge_pages", [](const py::tuple& view) { use_huge_pages(view_of(view)); }, py::arg("view"));
}

}  // namespace fusedloss
