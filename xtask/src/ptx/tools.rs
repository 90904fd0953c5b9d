//! NVRTC and ptxas from NVIDIA's wheels, downloaded once into the target
//! folder. Versions and sha256 stand in `tools/ptx/requirements.txt`; pip
//! checks them. Nothing of NVIDIA's becomes part of the repository.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{self, Command},
};

pub const PYTHON: &str = "python3";
const REQUIREMENTS: &str = "tools/ptx/requirements.txt";

/// Wheels that are unpacked in a folder.
#[derive(Debug)]
pub struct Tools {
    target: PathBuf,
    folder: PathBuf,
}

impl Tools {
    /// Downloads them if they are not there: about 65 MB.
    ///
    /// Errors, in words: no Python or pip, no network, other bytes than were
    /// pinned, another platform than Linux on x86-64.
    pub fn get(root: &Path) -> Result<Self, String> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err("PTX is made on Linux on x86-64: the wheels are pinned for it".into());
        }
        let requirements = root.join(REQUIREMENTS);
        let pinned = fs::read_to_string(&requirements)
            .map_err(|error| format!("{}: {error}", requirements.display()))?;
        let mut hasher = DefaultHasher::new();
        pinned.hash(&mut hasher);
        let target = target_folder(root);
        let folder = target.join(format!("cuda-tools-{:016x}", hasher.finish()));
        let tools = Self { target, folder };
        if !tools.folder.is_dir() {
            tools.download(&requirements)?;
        }
        for tool in [tools.nvrtc(), tools.ptxas()] {
            if !tool.is_file() {
                let folder = tools.folder.display();
                return Err(format!("{} is missing: remove {folder}", tool.display()));
            }
        }
        Ok(tools)
    }

    /// Into a folder of this process's, which then gets its name at once:
    /// another run finds all of it or nothing.
    fn download(&self, requirements: &Path) -> Result<(), String> {
        let partial = self.folder.with_extension(process::id().to_string());
        eprintln!("downloading NVRTC and ptxas (65 MB) to {}", self.folder.display());
        let status = Command::new(PYTHON)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(["--no-input", "--no-deps", "--no-compile", "--only-binary=:all:"])
            .args(["--require-hashes", "--requirement"])
            .arg(requirements)
            .arg("--target")
            .arg(&partial)
            .status()
            .map_err(|error| format!("{PYTHON}: {error}; pip is needed for the download"))?;
        if !status.success() {
            let _ = fs::remove_dir_all(&partial);
            return Err(format!("{PYTHON} -m pip could not download the wheels: {status}"));
        }
        match fs::rename(&partial, &self.folder) {
            Err(_) if self.folder.is_dir() => {
                let _ = fs::remove_dir_all(&partial);
                Ok(())
            }
            result => result.map_err(|error| format!("{}: {error}", self.folder.display())),
        }
    }

    pub fn nvrtc(&self) -> PathBuf {
        self.folder.join("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    }

    pub fn ptxas(&self) -> PathBuf {
        self.folder.join("nvidia/cuda_nvcc/bin/ptxas")
    }

    /// What `make` answers, kept under everything that it depends on beside
    /// the tools themselves.
    ///
    /// Errors, in words: those of `make`.
    pub fn kept(
        &self,
        key: &[&str],
        make: impl FnOnce() -> Result<String, String>,
    ) -> Result<String, String> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let place = self.folder.join("kept").join(format!("{:016x}", hasher.finish()));
        if let Ok(text) = fs::read_to_string(&place) {
            return Ok(text);
        }
        let text = make()?;
        // All or nothing; without it the next run only takes longer.
        let partial = place.with_extension(process::id().to_string());
        if fs::create_dir_all(self.folder.join("kept")).is_ok()
            && fs::write(&partial, &text).is_ok()
        {
            let _ = fs::rename(&partial, &place);
        }
        Ok(text)
    }

    /// An empty folder of this process's.
    pub fn work_folder(&self, name: &str) -> Result<WorkFolder, String> {
        let folder = self.target.join(format!("{name}-{}", process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(WorkFolder(folder))
    }
}

/// A folder that goes when this does.
#[derive(Debug)]
pub struct WorkFolder(PathBuf);

impl WorkFolder {
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where cargo builds.
pub fn target_folder(root: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from)
}
