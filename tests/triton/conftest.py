import os

# The kernels are read by the interpreter or by the compiler, for a whole process: TRITON_INTERPRET=1 must be set before
# triton is imported. test_interpreter.py runs the folder `interpreted` in processes of its own.
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_ahead_of_time.py", "test_interpreter.py"]
else:
    collect_ignore = ["interpreted"]
