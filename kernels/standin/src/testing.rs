//! The device that kernel tests run on: the stand-in, or with
//! `PREGATE_TEST_GPU=1` the first GPU of the machine.

use crate::Standin;
use pregate_kernels::cuda::{Device, DeviceOptions, Modules};

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

/// The stand-in, where tests run on it; `None` on a GPU, or when it was built
/// without a C++ compiler.
///
/// # Panics
/// If there is none, and `PREGATE_REQUIRE_STANDIN=1` says that there must be.
pub fn standin() -> Option<&'static Standin> {
    if is_set("PREGATE_TEST_GPU") {
        return None;
    }
    let standin = Standin::load();
    assert!(
        standin.is_some() || !is_set("PREGATE_REQUIRE_STANDIN"),
        "PREGATE_REQUIRE_STANDIN=1, and pregate-standin was built without a C++ compiler"
    );
    standin
}

/// A device for a test, or `None`, and it was said why.
///
/// # Panics
/// If the device cannot be opened.
pub fn device() -> Option<Device> {
    let modules = match standin() {
        Some(_) => Modules::Named,
        None if is_set("PREGATE_TEST_GPU") => Modules::BuiltIn,
        None => {
            println!("not run: no C++ compiler");
            return None;
        }
    };
    let options = DeviceOptions { modules };
    Some(Device::open(0, &options).unwrap_or_else(|error| panic!("no device: {error}")))
}
