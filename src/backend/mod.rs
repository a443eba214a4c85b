//! What the operations run on. A backend knows threads, vectors and products, and nothing of layernorm.

pub mod cpu;
