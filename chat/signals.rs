//! SIGINT, SIGTERM and SIGHUP as values on a thread of their own. On systems
//! without them, Ctrl-C ends the process as usual.

use crate::exit::{Failure, INTERRUPTED};
use pregate_runtime::Cancel;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Interrupt,
    /// With the exit code that this way of ending asks for.
    Terminate(u8),
}

/// How long a polite end may take after SIGTERM or SIGHUP.
#[cfg(unix)]
const GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// Calls `handle` for each signal from now on. After SIGTERM or SIGHUP the
/// process ends within a grace time, whatever `handle` does.
#[cfg(unix)]
pub fn forward(mut handle: impl FnMut(Signal) + Send + 'static) -> Result<(), Failure> {
    use signal_hook::{
        consts::{SIGHUP, SIGINT, SIGTERM},
        iterator::Signals,
    };
    let failed = |error| Failure::io("signals", error);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let watch = move || {
        for signal in signals.forever() {
            if signal == SIGINT {
                handle(Signal::Interrupt);
                continue;
            }
            let code = 128 + signal as u8;
            handle(Signal::Terminate(code));
            std::thread::sleep(GRACE);
            crate::tui::restore();
            std::process::exit(code.into());
        }
    };
    std::thread::Builder::new().name("signals".to_string()).spawn(watch).map(drop).map_err(failed)
}

#[cfg(not(unix))]
pub fn forward(_handle: impl FnMut(Signal) + Send + 'static) -> Result<(), Failure> {
    Ok(())
}

/// For commands that compute: the first SIGINT asks to stop, the second one
/// and SIGTERM end the process.
pub fn cancel_on_interrupt(cancel: Cancel) -> Result<(), Failure> {
    forward(move |signal| match signal {
        Signal::Interrupt if !cancel.is_cancelled() => cancel.cancel(),
        Signal::Interrupt => std::process::exit(INTERRUPTED.into()),
        Signal::Terminate(code) => std::process::exit(code.into()),
    })
}
