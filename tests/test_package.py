"What pip, importers and readers of the repository rely on"
import configparser, os, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest, yaml
if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib
import rlm

root = Path(__file__).resolve().parent.parent
config = configparser.ConfigParser(delimiters=['='], interpolation=None)
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']

def python(code, exe=sys.executable, at=sys.prefix):
    "Run `code` in a fresh interpreter, away from the checkout"
    return subprocess.run([exe, '-c', code], capture_output=True, text=True, cwd=at, timeout=600)

# Metadata ------------------------------------------------------------------------------------------------------------
def test_one_version(): assert settings['version'] == rlm.__version__

def test_static_metadata_repeats_settings():
    assert project['name'] == settings['lib_name']
    assert project['description'] == settings['description']
    assert project['requires-python'] == f">={settings['min_python']}"

def test_compromised_litellm_is_refused():
    for key in 'requirements', 'proxy_requirements':
        spec = next(r for r in settings[key].split() if r.startswith('litellm'))
        assert '!=1.82.7' in spec and '!=1.82.8' in spec

def test_changelog_opens_with_this_version():
    text = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(r'^## (\S+)', text, flags=re.M)[1] == rlm.__version__

# import rlm ----------------------------------------------------------------------------------------------------------
no_network = '''
import sys
def hook(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.bind'): raise OSError(f'{event} {args}')
sys.addaudithook(hook)
'''

def test_import_is_quiet_and_light():
    r = python(no_network + '''
before = set(sys.modules)
import rlm
print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}), file=sys.stderr)''')
    assert r.returncode == 0, r.stderr
    assert r.stdout == ''
    assert not {'litellm', 'IPython', 'httpx', 'openai'} & set(eval(r.stderr))

def test_import_is_fast():
    "In seconds of the processor, which a busy machine does not change: an import waits for nothing"
    code = "import time; t = time.process_time(); import rlm; print(time.process_time() - t)"
    assert float(python(code).stdout) < 0.3

@pytest.mark.parametrize('module', sorted(p.stem for p in (root/'rlm').glob('*.py') if p.stem[0] != '_'))
def test_modules_import_heavy_things_late(module):
    heavy = {'litellm', 'IPython', 'xllamacpp'} | ({'torch'} if module != 'train' else set())
    r = python(no_network + f"import rlm.{module}\nassert not {heavy} & set(sys.modules)")
    assert (r.returncode, r.stdout) == (0, ''), r.stderr

def test_public_names():
    assert len(rlm.__all__) <= 12
    for name in rlm.__all__: assert getattr(rlm, name) is not None
    assert set(rlm.__all__) <= set(dir(rlm))
    with pytest.raises(AttributeError): rlm.no_such_name

# The repository ------------------------------------------------------------------------------------------------------
def tracked(*paths):
    if not (root/'.git').exists() or not shutil.which('git'): pytest.skip('not a git checkout')
    r = subprocess.run(['git', 'ls-files', *paths], capture_output=True, text=True, cwd=root, check=True)
    return set(r.stdout.split())

def test_readme_is_current():
    r = subprocess.run([sys.executable, 'scripts/readme.py', '--check'], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr

def test_workflows():
    flows = {p.stem: yaml.safe_load(p.read_text()) for p in (root/'.github'/'workflows').glob('*.yml')}
    assert {'tests', 'docs', 'release'} <= set(flows)
    named = [c.split(' :: ')[-1] for c in project['classifiers'] if re.fullmatch(r'Programming Language :: Python :: 3\.\d+', c)]
    assert flows['tests']['jobs']['tests']['strategy']['matrix']['python'] == named
    assert named[0] == settings['min_python']

def hrefs(items):
    for item in items:
        if isinstance(item, str): yield item
        elif 'contents' in item: yield from hrefs(item['contents'])
        else: yield item['href']

def test_every_notebook_has_its_place_on_the_site():
    assert (root/'nbs'/'_quarto.yml').resolve() == root/'_quarto.yml'
    site = yaml.safe_load((root/'_quarto.yml').read_text())
    nbs = {str(p.relative_to(root/'nbs')) for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root/'nbs').parts)}
    assert sorted(hrefs(site['website']['sidebar']['contents'])) == sorted(nbs), 'name each notebook once in _quarto.yml'

@pytest.mark.slow
def test_chapters_that_need_torch():
    "Their cells run where torch is; elsewhere nbdev-test leaves them out"
    pytest.importorskip('torch')
    chapters = [p.name for p in (root/'nbs').glob('*.ipynb') if '"#| torch' in p.read_text(encoding='utf-8')]
    assert chapters
    r = subprocess.run(['nbdev-test', '--flags', 'torch', '--file-re', '|'.join(chapters)], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stdout + r.stderr

@pytest.fixture(scope='session')
def copied(tmp_path_factory):
    "A copy of what git tracks"
    src = tmp_path_factory.mktemp('src')
    for name in tracked():
        (src/name).parent.mkdir(parents=True, exist_ok=True)
        if (root/name).is_file(): shutil.copy(root/name, src/name)
    return src

@pytest.mark.slow
def test_notebooks_become_pages(copied):
    "All that the docs site needs before Quarto: nbdev runs cells with imports by themselves, so they may use nothing else"
    r = python('from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)', at=copied)
    assert r.returncode == 0, r.stderr
    pages = {p.name for p in (copied/'_proc').glob('*.ipynb')}
    assert pages == {p.name for p in (copied/'nbs').glob('*.ipynb')} and (copied/'_proc'/'_quarto.yml').is_file()

# Wheel and sdist -----------------------------------------------------------------------------------------------------
def venv(path, exe=sys.executable):
    subprocess.run([exe, '-m', 'venv', str(path)], check=True, capture_output=True)
    return str(path/'bin'/'python')

def pip(exe, *args):
    r = subprocess.run([exe, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *map(str, args)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

@pytest.fixture(scope='session')
def index():
    "Skip where pip reaches no package index"
    r = subprocess.run([sys.executable, '-m', 'pip', 'index', 'versions', 'fastcore'], capture_output=True, text=True)
    if r.returncode: pytest.skip('pip reaches no package index')

@pytest.fixture(scope='session')
def dists(index, copied, tmp_path_factory):
    "The sdist, and the wheel made from the sdist"
    out = tmp_path_factory.mktemp('dist')
    r = subprocess.run([sys.executable, '-m', 'build', '--outdir', str(out), str(copied)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return next(out.glob('*.tar.gz')), next(out.glob('*.whl'))

@pytest.mark.slow
def test_dists_hold_the_whole_package(dists):
    sdist, wheel = dists
    package = tracked('rlm')
    in_sdist = {name.partition('/')[2] for name in tarfile.open(sdist).getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert package | {'settings.ini', 'LICENSE', 'README.md', 'CHANGELOG.md'} <= in_sdist
    assert package <= in_wheel
    assert {name.partition('/')[0] for name in in_wheel} == {'rlm', f'rlm-{rlm.__version__}.dist-info'}

use_tools = (root/'tests'/'use_tools.py').read_text(encoding='utf-8')

def check_install(exe):
    r = python('import rlm, sys; print(rlm.__version__, rlm.__file__.startswith(sys.prefix))', exe)
    assert r.stdout.split() == [rlm.__version__, 'True'], r.stderr
    r = python(use_tools, exe)
    assert r.stdout.splitlines()[-1:] == ['found 4721'], r.stdout + r.stderr
    r = subprocess.run([str(Path(exe).parent/'rlm'), '--version'], capture_output=True, text=True)
    assert r.stdout.strip() == f'rlm {rlm.__version__}', r.stderr

def other_pythons():
    "Interpreters from 3.10 to 3.13 on this machine, this one's version excepted"
    here = f'3.{sys.version_info[1]}'
    for minor in range(10, 14):
        name = f'3.{minor}'
        homes = sorted(Path.home().glob(f'.pyenv/versions/{name}.*/bin/python'))
        exe = str(homes[-1]) if homes else shutil.which(f'python{name}')
        if name != here and exe: yield pytest.param(exe, id=name)

@pytest.mark.slow
def test_wheel_with_nothing_else_calls_tools(dists, tmp_path):
    exe = venv(tmp_path/'env')
    pip(exe, dists[1])
    check_install(exe)
    r = subprocess.run([str(Path(exe).parent/'rlm'), 'demo', '--lines', '100'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.startswith('rlm: ') and "pip install 'rlm[local]'" in r.stderr, r.stderr

@pytest.mark.slow
@pytest.mark.parametrize('exe', list(other_pythons()))
def test_sdist_on_other_pythons(dists, tmp_path, exe):
    exe = venv(tmp_path/'env', exe)
    pip(exe, f'{dists[0]}[local]')
    check_install(exe)
    assert python('import xllamacpp', exe).returncode == 0
