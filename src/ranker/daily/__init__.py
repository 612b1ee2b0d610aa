"""Daily training: for each new day of a log, train from yesterday's model, judge, and promote or refuse."""
