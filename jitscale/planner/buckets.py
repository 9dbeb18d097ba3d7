"""The size of the buckets in which ranks on GPUs reduce their gradients."""

BUCKETS = 10  # at least: the last bucket is reduced after backward, so at most a tenth cannot overlap with it
LEAST_ELEMENTS = 8_000_000  # 32 MB in float32: from this size on, a collective within a node is near full bandwidth
ELEMENTS_OF_A_RANK = 500_000  # 2 MB in float32: see below
MOST_BUCKETS = 30  # about; each bucket costs the host 0.2 ms


def reduce_bucket_elements(parameters: int, largest: int, ranks: int) -> int:
    """Elements of DeepSpeed's `reduce_bucket_size` for a network of `parameters` elements on `ranks` GPUs.

    `largest` is the size of its largest parameter. There are three limits, the strongest first:

    - A bucket holds the largest parameter. If a parameter is larger than a bucket, DeepSpeed's stage 3 reduces it
      outside its buffers, and frees it meanwhile.
    - There are at least `BUCKETS` buckets. DeepSpeed's default of 5e8 elements is a single bucket for networks up to
      JiT-L, so that no reduction starts before backward has ended. Many more than `MOST_BUCKETS` would cost the host
      more time than they hide.
    - A bucket is large enough to use the network's bandwidth. A ring of n ranks reduces S bytes in 2 (n - 1) steps of
      S / n bytes. A step takes the latency plus S / (n x bandwidth). At 10 microseconds and 50 GB/s, with 2 MB per
      rank, a fifth of the time is latency. Larger buckets would save less than that, and start later.

    The latency and the bandwidth are assumptions about a cluster, not measurements.
    """
    efficient = max(LEAST_ELEMENTS, ranks * ELEMENTS_OF_A_RANK, parameters // MOST_BUCKETS)
    return max(largest, min(efficient, -(-parameters // BUCKETS)))
