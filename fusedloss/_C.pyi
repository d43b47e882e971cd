# The compiled module: addresses, shapes and strides in, nothing but side effects out. Called from backends/cpp alone.

View = tuple[int, int, int, int, int, int, int, int]

def level() -> str: ...
def has_openmp() -> bool: ...
def softmax_ce(inputs: tuple, options: tuple, outputs: tuple, gradients: tuple, threads: int) -> None: ...
def softmax_stats(inputs: tuple, outputs: tuple, threads: int) -> None: ...
def softmax_stats_backward(inputs: tuple, saved: tuple, upstream: tuple, gradients: tuple, threads: int) -> None: ...
def class_stats(
    features: View,
    labels: int,
    ignore_index: int,
    num_classes: int,
    per_feature: bool,
    shift: int,
    seen: int,
    count: int,
    sum: int,
    square: int,
    skipped: int,
    threads: int,
) -> None: ...
def update_class_stats(
    count: int,
    mean: View,
    scatter: int,
    variance: int,
    rows: int,
    shift: int,
    sum: int,
    square: int,
    momentum: float,
    threads: int,
) -> None: ...
def row_magnitudes(rows: View, sum: int, threads: int) -> None: ...
def moments(values: int, is_double: bool, num_values: int, labels: int, ignore_index: int, moments: int) -> None: ...

class SupConPanel:
    is_double: bool
    similarity: int
    first: int
    rows: int
    columns: int
    codes: int
    mask: int
    mask_back: int
    common_shift: float
    row_shift: int
    negative_weight: int
    positive_weight: int
    share: int
    def __init__(self) -> None: ...

def supcon_maxima(panel: SupConPanel, num_anchors: int, threads: int) -> None: ...
def supcon_sums(panel: SupConPanel, exponentials: int, positives: int, threads: int) -> None: ...
def supcon_backward(panel: SupConPanel, softmax: int, positive: int, threads: int) -> float: ...
def row_norms(rows: View, norm: int, threads: int) -> None: ...
def project_rows(rows: View, norm: int, gradient: tuple, divide: bool, threads: int) -> None: ...
def target_products(pairs: tuple, threads: int) -> None: ...
def label_gradients(pairs: tuple, slope: int, gradients: tuple, is_double: bool, threads: int) -> None: ...
def use_huge_pages(view: View) -> None: ...
