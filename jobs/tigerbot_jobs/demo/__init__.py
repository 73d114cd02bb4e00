"""`tiger demo`: the whole story on one machine, every stage an ordinary spec whose result is kept."""
