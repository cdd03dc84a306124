"""Registration by elastix (itk-elastix, the extra "elastix")."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import SimpleITK as sitk

from nnunetv2_semi.data.registration import Kind, Linear, affine_from, matrix_and_offset, rigid_transform
from nnunetv2_semi.errors import UserError


class ElastixBackend:
    """elastix's own parameters for rigid or affine registration, from a start.

    Raises:
        UserError: itk-elastix is not installed.
    """

    def __init__(self) -> None:
        self._itk = _itk()

    def refined(self, moving: sitk.Image, fixed: sitk.Image, start: Linear, kind: Kind) -> Linear:
        itk = self._itk
        parameters = itk.ParameterObject.New()
        chosen = parameters.GetDefaultParameterMap(kind, 3)
        chosen["AutomaticTransformInitialization"] = ["false"]
        chosen["WriteResultImage"] = ["false"]
        parameters.AddParameterMap(chosen)
        method = itk.ElastixRegistrationMethod.New(self._image(fixed), self._image(_started(moving, start)))
        method.SetParameterObject(parameters)
        method.SetLogToConsole(False)
        method.SetNumberOfThreads(1)
        method.UpdateLargestPossibleRegion()
        found = _transform(method.GetTransformParameterObject().GetParameterMap(0), fixed.GetDimension())
        # elastix saw the moving image where the start takes it: both maps, one after the other
        matrix, offset = matrix_and_offset(found)
        outer_matrix, outer_offset = matrix_and_offset(start)
        matrix, offset = outer_matrix @ matrix, outer_matrix @ offset + outer_offset
        centre = np.array(start.GetCenter())
        translation = matrix @ centre + offset - centre
        if kind == "rigid":
            return rigid_transform(matrix, centre, translation)
        affine = affine_from(start)
        affine.SetMatrix(matrix.ravel().tolist())
        affine.SetTranslation(translation.tolist())
        return affine

    def _image(self, image: sitk.Image) -> object:
        converted = self._itk.image_from_array(sitk.GetArrayFromImage(image))
        converted.SetSpacing(image.GetSpacing())
        converted.SetOrigin(image.GetOrigin())
        direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
        converted.SetDirection(self._itk.matrix_from_array(direction))
        return converted


def _itk() -> ModuleType:
    try:
        import itk

        itk.ElastixRegistrationMethod  # noqa: B018  itk finds its modules when they are asked for
    except (ImportError, AttributeError) as error:
        raise UserError('The backend elastix needs itk-elastix: pip install "nnunetv2-semi[elastix]", or use '
                        "--backend simpleitk.") from error
    return itk


def _started(moving: sitk.Image, start: sitk.Transform) -> sitk.Image:
    """The moving image with a header that places it where the rigid ``start`` takes it."""
    matrix, _ = matrix_and_offset(start.GetInverse())
    placed = sitk.Image(moving)
    placed.SetOrigin(start.GetInverse().TransformPoint(moving.GetOrigin()))
    direction = matrix @ np.array(moving.GetDirection()).reshape(moving.GetDimension(), -1)
    placed.SetDirection(direction.ravel().tolist())
    return placed


def _transform(parameters: dict, dims: int) -> Linear:
    """What elastix found, in SimpleITK's form."""
    values = [float(value) for value in parameters["TransformParameters"]]
    centre = [float(value) for value in parameters["CenterOfRotationPoint"]]
    transform: Linear
    if parameters["Transform"][0] == "EulerTransform":
        transform = sitk.Euler2DTransform() if dims == 2 else sitk.Euler3DTransform()
    else:
        transform = sitk.AffineTransform(dims)
    transform.SetCenter(centre)
    transform.SetParameters(values)
    return transform
