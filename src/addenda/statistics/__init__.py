"""What a few seeds on shared items allow to be said: intervals, verdicts, and looking again and again."""
