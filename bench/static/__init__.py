"""Triton kernels judged from their machine code: what a call launches, what its kernels issue, a predicted time.

Needs no GPU. A call of the package's functions runs on tensors that only say they are on one (``gpu``); every launch is
compiled ahead of time for the target with the tiles, the specialisation and the arguments that it would have, and every
operation of PyTorch that would start a kernel is counted. The machine code is then walked through as a thread would
(``walk``): branches and loops are followed by the launch's own arguments, so that an instruction in a loop counts as
often as it would run.

The predicted time of a kernel is the longest of

    memory    bytes / copy bandwidth. Each tensor counts once, and once more for each later pass over it, as far as what
              all resident programs hold of it, with twice as much for what they write, exceeds half of the L2 cache.
    issue     instructions of the busiest multiprocessor's threads / (128 lanes x 1.9 GHz x share), where share is
              0.65 at 32 resident warps, 0.45 at 16 and in proportion below; or those of the longest program alone.
    products  flops of its matrix products / GEMM rate; tf32 at half the rate of bfloat16, mma.sync at 0.6 of wgmma.
              Added to "issue" where a multiprocessor holds one program: nothing else fills the waiting.
    starts    75 ns for each program that a multiprocessor starts
    launch    1.5 us, as in a captured graph

and that of one of PyTorch's operations bytes / copy bandwidth, or flops / GEMM rate. A call's is the sum of these.
Rates: H100 3.0 TB/s copied and 798 TFLOP/s in bfloat16, H200 4.3 TB/s and 790; float32 products at 50 TFLOP/s.
Predictions, good to about 30%: nothing here was timed. Use them to compare, and to find what a kernel is bound by.

Not seen: latency (a program's chain of loads and barriers when few programs are resident), conflicts in shared memory,
instructions of another rate than one a lane and cycle (MUFU at a quarter), the other threads of a program with warps of
several kinds, uneven programs beyond the 3, or where those differ 15, that are walked through.
"""
