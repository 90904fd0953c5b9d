//! Developer commands: `cargo xtask <command>`.

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask <command>

commands:
  golden SHARED   copy the golden models that the tests need from SHARED/golden to tests/data
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("golden"), Some(shared)) => {
            match golden::copy(shared.as_ref(), "tests/data".as_ref()) {
                Ok(report) => {
                    println!("{report}");
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("xtask golden: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        _ => {
            eprint!("{HELP}");
            ExitCode::from(2)
        }
    }
}

mod golden {
    use std::{fs, io, path::Path};

    /// Copies every file below `SHARED/golden` except what is only
    /// informative, and reports how much it was.
    pub fn copy(shared: &Path, into: &Path) -> io::Result<String> {
        let (mut files, mut bytes) = (0u64, 0u64);
        copy_tree(&shared.join("golden"), into, &mut |size| {
            files += 1;
            bytes += size;
        })?;
        Ok(format!("{files} files, {:.1} MB in {}", bytes as f64 / 1e6, into.display()))
    }

    fn copy_tree(from: &Path, to: &Path, count: &mut dyn FnMut(u64)) -> io::Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let target = to.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                copy_tree(&entry.path(), &target, count)?;
            } else {
                let content = fs::read(entry.path())?;
                fs::write(&target, &content)?;
                count(content.len() as u64);
            }
        }
        Ok(())
    }
}
