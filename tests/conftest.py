"A process started in the background is born with SIGINT ignored, and so would be all that it starts: Ctrl-C is tested, so it is heard"
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
