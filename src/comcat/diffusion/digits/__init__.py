"""The embedded demo: a small pipeline that is trained on the built-in digits and taught the one that it does not
know.
"""
