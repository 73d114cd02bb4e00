"""What makes several models one answer: members, dial, heads, judge, rewrite."""
