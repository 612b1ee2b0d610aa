"""The commands: one function for each, called by the console command ``evenkeel`` and by the files of scripts/."""
