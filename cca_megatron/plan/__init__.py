"""What a run costs, computed without one."""
