"""The ground of everything: a block as a frozen graph of primitive operations, and the law of each.

Holds the graph, the sizes of its values, what values can be made to reach, the laws, the array protocol in
which forwards are written, running a graph, and changes of its parameters. Imports `blockkit.errors` alone.
"""
