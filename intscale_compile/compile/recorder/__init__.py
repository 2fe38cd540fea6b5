"""What a compilation leaves behind for the tools of ``debug``: the graph after each stage, as tables and as Python."""
