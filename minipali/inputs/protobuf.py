"""Protocol buffers, as far as a SentencePiece model needs them."""

from minipali.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is written (3 and 4 are groups, which this file has none of)
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}


def read_varint(data, i):
    """The integer that begins at byte i, and where it ends: 7 bits a byte, lowest first; the 8th bit means "more"."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[i]
        i += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i
    raise InputError("a number of more than 64 bits, expected a protocol buffer")


def read_message(data, names):
    """{name: values in the order of the file} of the fields named by key; skips all others.

    A value is an int (VARINT) or bytes. Raises InputError for bytes that are no protocol buffer, and for a named field
    that is written in another way. (protobuf.dev/programming-guides/encoding)
    """
    fields, i, end = {}, 0, len(data)
    try:
        while i < end:
            # A quarter of a million pieces are read here, and a call takes longer than reading an integer of one byte.
            key, i = (data[i], i + 1) if data[i] < 128 else read_varint(data, i)
            kind = key & 7
            if kind == VARINT:
                value, i = read_varint(data, i)
            else:
                if kind == BYTES:
                    size, i = (data[i], i + 1) if data[i] < 128 else read_varint(data, i)
                elif kind in FIXED_SIZES:
                    size = FIXED_SIZES[kind]
                else:
                    raise InputError(f"a field of wire type {kind}, expected a protocol buffer with 0, 1, 2 and 5")
                value, i = data[i:i + size], i + size
                if i > end:
                    raise IndexError
            if key in names:
                fields.setdefault(names[key], []).append(value)
            elif key < 8 or key >> 3 in [known >> 3 for known in names]:
                raise InputError(f"field {key >> 3} has wire type {kind}, expected another")
    except IndexError:
        raise InputError("ends in the middle of a field, expected a complete protocol buffer") from None
    return fields


def read_nested(message, name, names):
    """The last value of each field of a nested message: {name: value}."""
    # It is the format's rule that a message in two halves means both together, and of a value given twice the last.
    try:
        nested = read_message(b"".join(message.get(name, [])), names)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return {name: values[-1] for name, values in nested.items()}
