# The compiled module: addresses, shapes and strides in, nothing but side effects out. Called from backends/cpp alone.

View = tuple[int, int, int, int, int, int, int, int]

def level() -> str: ...
def has_openmp() -> bool: ...
def check_labels(labels: int, count: int, num_classes: int, ignore_index: int, name: str) -> None: ...

class RowOptions:
    # Its arguments and members are the fields of core.row_loss.RowOptions, which csrc/row_options.h lists too.
    def __init__(self, *values: float, **fields: float) -> None: ...
    def __getattr__(self, field: str) -> float: ...

# The named tuples of core.operands with a view or the address of a contiguous tensor for each tensor, 0 for None.
class LogitInputs:
    def __init__(
        self,
        logits: View,
        target: View | int,
        scale: int = 0,
        bias: int = 0,
        class_weight: int = 0,
        target_override: int = 0,
        target_override_grad: int = 0,
        soft_cap: float = 0.0,
        ignore_index: int = -100,
    ) -> None: ...

class RowInputs:
    def __init__(self, label_smoothing: int = 0, sample_weight: int = 0, penalty_strength: int = 0) -> None: ...

class SoftmaxGrads:
    def __init__(
        self,
        logits: View | None = None,
        scale: int = 0,
        bias: int = 0,
        target_override: int = 0,
        label_smoothing: int = 0,
        penalty_strength: int = 0,
    ) -> None: ...

class SoftmaxStatistics:
    def __init__(
        self,
        row_max: int,
        row_sum: int,
        log_sum_exp: int,
        target_logit: int,
        cross_entropy: int,
        smooth_loss: int,
        one_minus_pt: int,
        hinge: int,
        prediction: int,
        confidence: int,
    ) -> None: ...

class SavedStatistics:
    def __init__(self, row_max: int, row_sum: int, one_minus_pt: int) -> None: ...

class StatisticsGrads:
    def __init__(
        self,
        log_sum_exp: int = 0,
        target_logit: int = 0,
        cross_entropy: int = 0,
        smooth_loss: int = 0,
        one_minus_pt: int = 0,
        hinge: int = 0,
    ) -> None: ...

def softmax_ce(
    inputs: LogitInputs,
    rows: RowInputs,
    options: RowOptions,
    mean: bool,
    grad_scale: float,
    loss: int,
    row_loss: int,
    grads: SoftmaxGrads,
    threads: int,
) -> None: ...
def softmax_stats(inputs: LogitInputs, penalty_margin: float, statistics: SoftmaxStatistics, threads: int) -> None: ...
def softmax_stats_backward(
    inputs: LogitInputs,
    saved: SavedStatistics,
    penalty_margin: float,
    upstream: StatisticsGrads,
    grads: SoftmaxGrads,
    threads: int,
) -> None: ...
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
def project_rows(rows: View, norm: int, grad: int, is_double: bool, divide: bool, threads: int) -> None: ...

class TargetPairs:
    def __init__(
        self,
        input: View,
        weight: View,
        target: int,
        input_norm: int,
        class_norm: int,
        target_product: int,
        ignore_index: int,
    ) -> None: ...

def target_products(pairs: TargetPairs, threads: int) -> None: ...
def add_target_grads(
    pairs: TargetPairs, grad_product: int, grad_input: int, grad_weight: int, is_double: bool, threads: int
) -> None: ...
def use_huge_pages(view: View) -> None: ...
