"""What PyTorch's CPU allocator hands out while something runs."""

from torch.profiler import ProfilerActivity, profile


def allocated_at_most(run):
    """Bytes of the allocator above what there was, at the worst moment of ``run()``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
