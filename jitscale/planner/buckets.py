"""In pieces of which size ranks on GPUs reduce their gradients."""

BUCKETS = 10  # at least: the last one is reduced when backward has ended, so a tenth at most has nothing to hide behind
LEAST_ELEMENTS = 8_000_000  # 32 MB in float32: a collective within a node comes near its bandwidth from there on
ELEMENTS_OF_A_RANK = 500_000  # 2 MB in float32: see below
MOST_BUCKETS = 30  # about: the host takes 0.2 ms for each


def reduce_bucket_elements(parameters: int, largest: int, ranks: int) -> int:
    """Elements of DeepSpeed's `reduce_bucket_size` for a network of `parameters` elements on `ranks` GPUs.

    `largest` is the size of its largest parameter. Three limits, the last one first:

    - A bucket holds the largest parameter. DeepSpeed's stage 3 reduces a larger one outside its buffers, and frees it
      meanwhile.
    - There are at least `BUCKETS` buckets. DeepSpeed's default, 5e8 elements, is one bucket up to JiT-L: nothing is
      reduced before backward has ended. Many more than `MOST_BUCKETS` would cost the host more than they hide.
    - A bucket uses the network's bandwidth. A ring of n ranks reduces S bytes in 2 (n - 1) steps of S / n bytes, and a
      step takes its latency and S / (n x bandwidth). At 10 microseconds and 50 GB/s, with 2 MB a rank, a fifth of the
      time is latency. Larger buckets gain less than that, and start later.

    The latency and the bandwidth are assumptions about a cluster, not measurements.
    """
    efficient = max(LEAST_ELEMENTS, ranks * ELEMENTS_OF_A_RANK, parameters // MOST_BUCKETS)
    return max(largest, min(efficient, -(-parameters // BUCKETS)))
