"""What tests share: backends, the oracle, tolerances, which combinations run."""
