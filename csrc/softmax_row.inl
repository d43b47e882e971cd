// A row of logits: statistics in one pass over x, gradient in one more over exp(z - max), which is kept in the
// gradient's own row (or in a buffer where types differ).

template <class T, class In>
class RowSweep {
public:
    using Reader = RowReader<T, In>;
    using Writer = RowWriter<T, In>;

    RowSweep(const LogitInputs<T>& inputs, const SoftmaxGrads<T>& grads, int thread)
        : z_(inputs),
          soft_targets_(inputs),
          reader_(inputs, z_, soft_targets_),
          writer_(inputs, grads, thread, z_, soft_targets_) {}
    RowSweep(const RowSweep&) = delete;
    RowSweep& operator=(const RowSweep&) = delete;

    Reader& reader() { return reader_; }

    // What is prefetched while the row is read.
    void set_next(NextRow next) {
        reader_.set_next(next);
        soft_targets_.prefetch();
    }

    void bypass_caches() { writer_.bypass_caches(); }

    template <class Out>
    void write(const typename Writer::Place& place, const GradCoefficients& coeffs, const HingeSums* hinge, T* e,
               Out* gradient) {
        writer_.write(place, reader_, coeffs, hinge, e, gradient);
    }

private:
    LogitChunks<T, In> z_;
    SoftTargets<T> soft_targets_;
    Reader reader_;
    Writer writer_;
};
