"""The making of the policy that the embedded world starts from."""
