"""The search environment as a package of verifiers, and tasksets of theirs for `sleuth train`."""
