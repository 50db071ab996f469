"""Numbers that compare answers with the truth, each checked against an outside oracle."""
