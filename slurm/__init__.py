"""All that is peculiar to Slurm. Empty until that back end lands; the folder is part of the fixed top level."""
