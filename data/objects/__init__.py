"""Objects that a user names by `module.name`: found, checked, built; and names of earlier versions."""
