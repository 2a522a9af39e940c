"""Labels of words and answers: their file format, the rule, agreement, endpoints."""
