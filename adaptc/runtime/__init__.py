"""Run programs: options, the arguments and code of calls, and the values that are kept between calls."""
