//! A simulated CUDA driver: runs PTX on the CPU, checked like a sanitizer, counted like a profiler.
