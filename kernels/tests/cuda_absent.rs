//! A machine without CUDA: the library answers with an error and never
//! panics. Nothing of the stand-in is loaded into this process.

use pregate_kernels::cuda::{CudaError, Device, DeviceOptions};

#[test]
fn opening_a_device_never_panics() {
    // Where there is a driver, there may be no GPU of this number.
    match Device::open(1 << 20, &DeviceOptions::default()) {
        Ok(device) => panic!("GPU {} exists", device.info().ordinal),
        Err(CudaError::NoDriver) => {
            let error = Device::open(0, &DeviceOptions::default()).err();
            assert_eq!(error, Some(CudaError::NoDriver), "asking twice changes nothing");
            let text = CudaError::NoDriver.to_string();
            assert!(text.contains("libcuda") && text.contains("CPU"), "{text}");
        }
        Err(CudaError::NoDevice | CudaError::NoSuchDevice { .. } | CudaError::AfterResume) => {}
        Err(CudaError::OldDriver { .. } | CudaError::DriverMismatch { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}
