//! The device layer over the stand-in driver, which runs streams as late, as
//! early or as randomly as a real one may, poisons what has no contents yet,
//! counts what is alive, and fails where it is told to. Tests that need none
//! of that run on a GPU as well (`PREGATE_TEST_GPU=1`).

mod copies;
mod failures;
mod graphs;
mod links;
mod mapped;
mod memory;
mod opening;
mod published;
mod world;
