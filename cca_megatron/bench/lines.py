"""What the terminal says of each row of the benchmarks that run Megatron."""

from cca_megatron.bench.results import Event, Measured
from cca_megatron.bench.sizes import BASELINE


def matched_line(event: Event) -> str:
    """Of ``bench block --matched``: the methods of one length and matching."""
    assert isinstance(event, Measured)
    row = event.row
    lines = [f"matched {row['matched']}, {row['tokens']:,} tokens, forward and backward against {BASELINE}:"]
    for name, method in row["methods"].items():
        both = method["both"]
        lines.append(
            f"  {name:<6} {method['heads']:<13} {both['ratio']:.2f} ({both['ratio_low']:.2f} to "
            f"{both['ratio_high']:.2f}), {method['parameters']:,} parameters, "
            f"{method['cache_bytes_per_token']:,} bytes cached per token, "
            f"{method['kept_bytes'] / 2**20:,.1f} MiB kept, {method['peak_bytes'] / 2**20:,.1f} MiB at most"
        )
    return "\n".join(lines)


def context_line(event: Event) -> str:
    """Of ``bench cp``."""
    assert isinstance(event, Measured)
    row = event.row
    if row["ranks"] == 1:
        return f"{row['method']} on 1 rank: {row['work_seconds']:.3f} s of work"
    return (
        f"{row['method']} on {row['ranks']} ranks, {row['comm_type']}: {row['work_ratio']:.2f} of the work "
        f"on the busiest rank, {row['sent_bytes']:,.0f} bytes sent, {row['planned_bytes']:,.0f} planned"
    )


def step_line(event: Event) -> str:
    """Of ``bench step``."""
    assert isinstance(event, Measured)
    row = event.row
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["share"].items())
    return (
        f"{row['recipe']}: {row['seconds']:.3f} s a step ({row['seconds_low']:.3f} to "
        f"{row['seconds_high']:.3f}), {row['tokens_per_second']:,.0f} tokens/s; {shares}"
    )


def data_line(event: Event) -> str:
    """Of ``bench data``."""
    assert isinstance(event, Measured)
    row = event.row
    speed = f"{row['tokens_per_second']:,.0f} tokens/s"
    if row["part"] == "prepare":
        return f"prepare with {row['workers']} processes: {speed}, {row['ratio']:.2f} times one process"
    return f"{row['kind']}: {speed}, {row['ratio']:.3f} of a plain read"
