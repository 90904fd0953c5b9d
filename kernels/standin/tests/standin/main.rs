//! The stand-in for libcuda, by the real cudarc: that it does what a driver
//! and a device do, and that it finds what they may let pass.

mod driver;
mod kernels;
mod spins;
mod support;
