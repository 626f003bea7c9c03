"""Headers of pictures: what a stream announces, read without a decoder and before one runs.

Decoders allocate what a header announces and decode as many pictures as there are. A checksum does
not help against a file that was made to lie. So a stream is read to its end here, and what our
encoders do not write is refused.
"""
