//! One token that the host and the device work on together (`mailbox.cu`):
//! the pieces alone, and a small step of two layers, captured as a graph or
//! launched one by one, with the stand-in's streams lazy, eager and random.

#[path = "../lab/mod.rs"]
mod lab;

mod loading;
mod machine;
mod misuse;
mod pieces;
mod steps;
