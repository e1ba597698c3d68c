"""Generation with a cache: keys, values, and the few rows that convs and value shift look back to."""
